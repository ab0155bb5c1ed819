"""The interface between an engine and a LISA run, for any framework: ``Engine``, ``Observed``, ``Collectives``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lisa_ds.layers import Unit


class Engine(Protocol):
    """Trains some units of a model and freezes the others. Units are blocks, by index over the whole model, and roles.

    A rank need not hold every block: units that it does not hold are skipped.
    """

    @property
    def sampled_layers(self) -> tuple[int, ...]:
        """Blocks that train now, ascending; equal on all ranks."""

    @property
    def sampled_roles(self) -> tuple[str, ...]:
        """The roles (``embeddings``, ``lm_head``, ``rest``) that train now."""

    def present(self, roles: Iterable[str]) -> tuple[str, ...]:
        """Those of ``roles`` in which something can train."""

    def train_units(self, layers: Collection[int], roles: Collection[str]) -> None:
        """Train exactly these from the next forward on; called between optimizer steps, on all ranks alike.

        The state of units that stop training is released, and units that begin to train begin without moments. Units
        that train before and after keep their state.
        """

    def set_lr_scales(self, scales: Mapping[int, float]) -> None:
        """Learning-rate factor of blocks until the next call; of those not named, 1."""

    def memory_report(self) -> dict[str, int]:
        """Bytes of live model-state tensors on this rank, by kind."""

    def unit_squares(self) -> Mapping[Unit, Tensor]:
        """Squared 2-norm of the gradient of each unit that trains: ``()``, float64, by unit, equal on all ranks.

        They are of the whole gradient that a step uses: averaged over ranks, accumulated, without the loss scale,
        before clipping and the norm-growth limit. Called on all ranks alike, between the last backward of a step and
        the step.
        """

    def state_of(self, unit: Unit) -> Sequence[Mapping[str, Any]]:
        """The live optimizer state of ``unit`` on this rank, not a copy; empty if it does not train.

        Returns:
            A table for each piece that the engine keeps state in (a parameter, or several in one), which holds ``exp_avg``,
            ``exp_avg_sq`` and ``step`` by the names of ``torch.optim.AdamW`` once the unit has taken a step.
        """

    @property
    def ranks(self) -> Collectives:
        """Collectives over all ranks of the run."""


class Observed(Protocol):
    """Statistics of the training gradients, by block."""

    def take(self) -> list[float | None]:
        """Root mean square norm of each block since the last call, equal on all ranks; None where it did not train."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's statistics since the last :meth:`take`: plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where :meth:`state_dict` was taken."""


@dataclass(frozen=True)
class Collectives:
    """Collectives over all ranks of a run, as functions."""

    add: Callable[[Tensor], Any]
    """Replaces a tensor by its sum over all ranks."""

    maximum: Callable[[Tensor], Any]
    """Replaces a tensor by its element-wise maximum over all ranks."""

    texts: Callable[[str], list[str]]
    """All-gathers a text from each rank, in rank order."""

    device: torch.device
    """Where tensors must be."""
