"""What an engine offers a LISA run, and what it hands to it; nothing here knows a framework."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Engine(Protocol):
    """Trains some units of a model and freezes the others. Units are blocks, by index over the whole model, and roles.

    A rank need not hold every block: what it lacks it passes over.
    """

    @property
    def sampled_layers(self) -> tuple[int, ...]:
        """Blocks that train now, ascending; equal on all ranks."""

    @property
    def sampled_roles(self) -> tuple[str, ...]:
        """Of ``embeddings``, ``lm_head`` and ``rest``, those that train now."""

    def present(self, roles: Iterable[str]) -> tuple[str, ...]:
        """Those of ``roles`` of which something can train."""

    def train_units(self, layers: Collection[int], roles: Collection[str]) -> None:
        """Train exactly these from the next forward on; called between optimizer steps, on all ranks alike.

        The state of what leaves is released, and what comes begins without moments. What stays keeps its state.
        """

    def set_lr_scales(self, scales: Mapping[int, float]) -> None:
        """Learning-rate factor of blocks until the next call; of those not named, 1."""

    def memory_report(self) -> dict[str, int]:
        """Bytes of live model-state tensors on this rank, by kind."""


class Observed(Protocol):
    """What was seen of the gradients in training, by block."""

    def take(self) -> list[float | None]:
        """Root mean square norm of each block since the last call, equal on all ranks; None where it did not train."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank has seen since the last :meth:`take`: plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where :meth:`state_dict` was taken."""


@dataclass(frozen=True)
class Collectives:
    """How all ranks of a run talk to each other."""

    add: Callable[[Tensor], Any]
    """Replaces a tensor by its sum over all ranks."""

    maximum: Callable[[Tensor], Any]
    """Replaces a tensor by its largest elements over all ranks."""

    texts: Callable[[str], list[str]]
    """A text of each rank, in their order."""

    device: torch.device
    """Where tensors must be."""
