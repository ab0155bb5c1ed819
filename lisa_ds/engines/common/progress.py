"""The progress of a LISA run as saved in a checkpoint, and whether another run may resume from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_BEFORE_THERE_WERE_OTHERS = {
    **{"unit": "block", "block_rest": "always", "adapters": "None"},
    **{"optimizer.precision": "mixed", "optimizer.moments": "fp32"},
}


@dataclass(frozen=True)
class Progress:
    """The progress of a run. Future draws follow from the step and the config, or else from ``draws`` too."""

    step: int
    """Applied optimizer steps."""

    sampled: tuple[int, ...]
    """Blocks that were training."""

    roles: tuple[str, ...] | None
    """Roles that were training; None in older checkpoints, from when they were the same in all intervals."""

    history: tuple[tuple[int, ...], ...]
    """Every set of blocks drawn so far."""

    num_layers: int
    policies: dict[str, str]
    """Policies of embeddings, head and rest (one that never trains has no state in the file), and the format of
    state."""

    next_draw: int
    """Fingerprint of the schedule: hash of the next interval's draw, by which a changed schedule is noticed."""

    frozen: tuple[str, ...] | None = None
    """Parameters frozen before the engine was built; None in older checkpoints, which do not record it."""

    draws: dict[str, Any] | None = None
    """This rank's statistics, where draws depend on them; None in older checkpoints."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, so that a checkpoint can be read without this package."""
        return asdict(self)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Progress:
        """Read what :meth:`as_dict` returned, also in earlier releases."""
        return cls(
            step=saved["step"],
            sampled=tuple(saved["sampled"]),
            roles=tuple(saved["roles"]) if "roles" in saved else None,
            history=tuple(tuple(layers) for layers in saved["history"]),
            num_layers=saved["num_layers"],
            policies={**_BEFORE_THERE_WERE_OTHERS, **saved["policies"]},
            next_draw=saved["next_draw"],
            frozen=None if saved.get("frozen") is None else tuple(saved["frozen"]),
            draws=saved.get("draws"),
        )

    def refusal(self, *, num_layers: int, policies: Mapping[str, str], frozen: Collection[str]) -> str | None:
        """Why a run with these settings cannot resume from here, and the remedy; None if it can."""
        if self.num_layers != num_layers and self.policies.get("unit") == policies.get("unit"):
            return f"is of a model with {self.num_layers} layers; this one has {num_layers}"
        if self.policies != policies:
            changed = ", ".join(
                f"{role} {was!r} (now {policies.get(role)!r})"
                for role, was in self.policies.items()
                if was != policies.get(role)
            )
            return f"was saved with lisa.{changed}; resume with the saved policies, or start from its weights alone"
        if changed := self._other_frozen(frozen):
            return f"{changed}; freeze the same ones before initialize, or start from its weights alone"
        return None

    def _other_frozen(self, here: Collection[str]) -> str:
        if self.frozen is None:
            return ""
        parts = []
        for names, what in (
            (sorted(set(self.frozen).difference(here)), "were frozen when it was saved, and train here"),
            (sorted(set(here).difference(self.frozen)), "are frozen here, and trained when it was saved"),
        ):
            if names:
                parts.append(
                    f"{len(names)} parameters {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
                )
        return "; ".join(parts)
