"""Norm-growth limiter of Fira (arXiv:2410.01623), applied to a unit's gradient instead of a matrix's.

If a unit's gradient norm exceeds f times that of its previous step (after limiting), the gradient is scaled down to
that. The norms are of the gradient that a step uses: reduced over all ranks, accumulated, without the loss scale. They
stay on the device, without host syncs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lisa_ds.layers import Unit


class NormGrowthLimit:
    """The norm-growth limiter; keeps the norm of each unit's last gradient.

    Args:
        factor: Largest growth of a norm in a step, above 1; None for no limit.
    """

    def __init__(self, factor: float | None = None) -> None:
        self.factor = factor
        """As given."""
        self._last: dict[
            Unit, Tensor
        ] = {}  # of the units that train and have one: the norm of the last step, as it was limited
        self._coming: tuple[Tensor, Tensor] | None = None  # of the step in progress: norms as limited, factors
        self._order: list[Unit] = []  # of what is in ``_coming``

    def keep(self, units: Iterable[Unit]) -> None:
        """Set the units that train to ``units``; the norms of others are dropped."""
        kept = set(units)
        self._last = {unit: norm for unit, norm in self._last.items() if unit in kept}
        self._coming = None

    def begin_anew(self) -> None:
        """Drop all norms."""
        self._last, self._coming = {}, None

    def stepped(self) -> None:
        """Record that a step was applied, not skipped for overflow."""
        if self._coming is not None:
            self._last = dict(zip(self._order, self._coming[0].unbind(), strict=True))
            self._coming = None

    def limit(self, order: Sequence[Unit], norms: Tensor) -> Tensor:
        """Compute the factors that limit the gradients of the step in progress.

        Args:
            order: The units that train.
            norms: ``(units,)``, float64: the norm of each one's gradient, without the loss scale.

        Returns:
            ``(units,)``: the norms once each gradient is multiplied by :meth:`of`; not finite where they were not.
        """
        assert self.factor is not None
        none = norms.new_full((), float("inf"))
        last = torch.stack([self._last.get(unit, none) for unit in order])
        # A gradient of nothing but zeros bounds nothing: a unit would never move again.
        bounds = torch.where(last > 0, last * self.factor, none)
        factors = (bounds / norms).clamp(max=1.0)
        factors = torch.where(norms > 0, factors, 1.0)
        self._order, self._coming = list(order), (norms * factors, factors)
        return self._coming[0]

    def of(self, unit: Unit) -> Tensor | None:
        """The factor of ``unit``'s gradient in the step in progress: ``()``, on the device; None for 1."""
        return None if self._coming is None else self._coming[1][self._order.index(unit)]

    def state_dict(self) -> dict[Unit, float]:
        """The norms as plain values, exactly."""
        return {unit: float(norm) for unit, norm in self._last.items()}

    def load_state_dict(self, norms: Mapping[Unit, float], units: Collection[Unit], device: torch.device | str) -> None:
        """Restore from a checkpoint, for ``units``, which train now."""
        self._last = {
            unit: torch.tensor(norm, dtype=torch.float64, device=device)
            for unit, norm in (norms.items() if self.factor is not None else ())
            if unit in units
        }
        self._coming = None
