"""How many blocks an interval draws: a constant, more from given intervals on, or more when the loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lisa_ds.config import LisaConfig


class Growth:
    """The number of blocks to draw.

    Args:
        num_layers: Number of blocks of the model.
        config: The ``lisa`` section.

    Raises:
        ConfigError: More blocks are asked for than the model has, or none.
    """

    def __init__(self, num_layers: int, config: LisaConfig) -> None:
        self._config = config.growth
        self._most = config.most_sampled(num_layers)
        self._first = config.num_sampled(num_layers)
        self._count = self._first
        self._lowest = math.inf
        self._waited = 0

    @property
    def watches_loss(self) -> bool:
        """Whether :meth:`observe` is to be called at the end of each interval."""
        return self._config is not None and self._config.patience is not None

    def at(self, interval: int) -> int:
        """Blocks to draw in ``interval``; where the loss decides, those of the next draw, whatever ``interval`` is."""
        if self._config is None or self._config.schedule is None:
            return self._count
        begun = [begin for begin in self._config.schedule if begin <= interval]
        return self._config.schedule[max(begun)] if begun else self._first

    def observe(self, loss: float, affords: Callable[[int], bool] = lambda count: True) -> None:
        """Record an interval's mean training loss, equal on all ranks; draw more blocks if it has stopped falling.

        Args:
            loss: A loss that is not finite counts as not lower.
            affords: Whether this many blocks fit into the memory budget.
        """
        if self._config is None or self._config.patience is None:
            return
        if loss < self._lowest - self._config.threshold * abs(self._lowest) or self._lowest == math.inf:
            self._lowest = loss if math.isfinite(loss) else self._lowest
            self._waited = 0
            return
        self._waited += 1
        if self._waited < self._config.patience:
            return
        self._waited = 0
        wanted = min(self._count + self._config.add, self._most)
        while wanted > self._count and not affords(wanted):
            wanted -= 1
        self._count = wanted

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values."""
        return {"count": self._count, "lowest": self._lowest, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`state_dict`; the first and the largest number of blocks come from the config."""
        if self.watches_loss:
            self._count = max(self._first, min(state["count"], self._most))
            self._lowest, self._waited = state["lowest"], state["waited"]
