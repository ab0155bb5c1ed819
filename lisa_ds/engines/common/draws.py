"""The draw of each interval: reduces statistics over ranks, measures scores when due, and compares draws on all ranks.

Each rank draws for itself, from statistics that are equal on all of them. Should they ever differ (another config on one rank, a
flipped bit), ranks would train different layers, and the first collective would hang or mix up gradients. So every draw is compared
by a hash, in one collective of two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lisa_ds.engines.common.protocol import Collectives, Observed
from lisa_ds.errors import EngineError
from lisa_ds.sampling import LayerSampler, fingerprint


class Draws:
    """The draws of a run, one after the other.

    Args:
        sampler: Draws the blocks of an interval.
        measure: Measures the score of each block; equal on all ranks.
        gradients: Statistics of the training gradients, for a sampler that uses them.
        affords: Whether this many blocks fit into the memory budget of a rank.
        ranks: Collectives over all ranks.
    """

    def __init__(
        self,
        sampler: LayerSampler,
        *,
        measure: Callable[[], Sequence[float]],
        gradients: Observed | None,
        affords: Callable[[int], bool],
        ranks: Collectives,
    ) -> None:
        self._sampler = sampler
        self._measure, self._gradients, self._affords = measure, gradients, affords
        self._ranks = ranks
        self._at_first = sampler.state_dict()
        self._losses: Tensor | None = None  # their sum and number on this rank in this interval
        self.pending = sampler.needs_scores(0)
        """Whether the first draw waits for scores: the engine is built with a uniform one."""

    def note_loss(self, loss: Tensor) -> None:
        """Record the loss of a micro-batch, without a host sync."""
        if self._sampler.growth.watches_loss:
            value = loss.detach().double().reshape(())
            counts = value.isfinite()  # a step that overflows is no step
            seen = torch.stack([torch.where(counts, value, 0.0), counts.double()])
            self._losses = seen if self._losses is None else self._losses + seen

    def at(self, interval: int, *, ended: bool = True) -> tuple[int, ...]:
        """The blocks of ``interval``, equal on all ranks.

        Args:
            interval: The one that begins.
            ended: Whether an interval has ended, whose statistics then count.

        Raises:
            EngineError: Ranks drew differently. Every rank raises.
        """
        if ended:
            self._learn(interval)
        if self._sampler.needs_scores(interval):
            self._sampler.set_scores(self._measure(), interval)
        self.pending = False
        layers = self._sampler.layers_at(interval)
        self.agree(f"interval {interval}", layers)
        return layers

    def _learn(self, interval: int) -> None:
        if self._gradients is not None:
            self._sampler.observe(self._gradients.take(), interval)
        if self._sampler.growth.watches_loss:
            if self._losses is None:
                raise EngineError(
                    "lisa.growth.patience: watches the loss that engine.backward(loss) is given, and there was none in this "
                    "interval; call engine.backward, or give growth.schedule"
                )
            total = self._losses.to(self._ranks.device)
            self._ranks.add(total)
            self._losses = None
            if total[1] > 0:
                self._sampler.growth.observe(float(total[0] / total[1]), self._affords)

    def agree(self, what: str, fact: Any) -> None:
        """Compare ``fact`` on all ranks.

        Raises:
            EngineError: It differs. Every rank raises.
        """
        own = fingerprint(fact)
        extremes = torch.tensor([own, -own], dtype=torch.int64, device=self._ranks.device)
        self._ranks.maximum(extremes)
        if int(extremes[0]) == -int(extremes[1]):
            return
        by_fact: dict[str, list[int]] = {}
        for rank, text in enumerate(self._ranks.texts(repr(fact))):
            by_fact.setdefault(text, []).append(rank)
        told = "; ".join(f"ranks {ranks}: {text[:300]}" for text, ranks in by_fact.items())
        raise EngineError(
            f"{what}: ranks differ and would train apart: {told}. Give every rank the same lisa config and data"
        )

    def go_on(self) -> None:
        """Keep the present draw, which a caller or a checkpoint has chosen. The next one is this sampler's."""
        self.pending = False

    def begin_anew(self) -> None:
        """Reset all statistics."""
        self._sampler.load_state_dict(self._at_first)
        self._losses = None
        if self._gradients is not None:
            self._gradients.take()
        self.pending = self._sampler.needs_scores(0)

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to resume the draws exactly, also within an interval."""
        losses = None if self._losses is None else self._losses.tolist()
        gradients = None if self._gradients is None else self._gradients.state_dict()
        return {
            "sampler": self._sampler.state_dict(),
            "losses": losses,
            "gradients": gradients,
            "pending": self.pending,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`state_dict`."""
        self._sampler.load_state_dict(state["sampler"])
        losses = state["losses"]
        self._losses = None if losses is None else torch.tensor(losses, dtype=torch.float64, device=self._ranks.device)
        if self._gradients is not None and state["gradients"] is not None:
            self._gradients.load_state_dict(state["gradients"])
        self.pending = state["pending"]
