"""Stage 3's lists with one entry for each sub-group: keeps all entries, and shows Stage 3 only those that train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lisa_ds.engines.zero3 import supported
from lisa_ds.layers import Unit


class SubGroups:
    """The whole layout of a Stage 3 optimizer, in order.

    Args:
        stage3: The optimizer, laid out but without state yet.
        unit_of: ``id(parameter)`` to its unit.
    """

    def __init__(self, stage3: Any, unit_of: Mapping[int, Unit]) -> None:
        self._lists: dict[str, list[Any]] = {name: list(getattr(stage3, name)) for name in supported.SUB_GROUP_LISTS}
        self._param_group_of: dict[int, int] = dict(stage3.sub_group_to_group_id)
        self.units: list[Unit] = [unit_of[id(group[0])] for group in self._lists["fp16_groups"]]
        """The unit of each."""
        self.weights: list[Tensor] = self._lists["fp16_partitioned_groups_flat"]
        """The 16-bit partition of each, ``(numel,)``."""
        self.shown: list[int] = []
        """The sub-groups that the lists show now."""
        self.shown_units: list[Unit] = []
        """The unit of each of those."""

    def show(self, stage3: Any, sub_groups: Sequence[int], masters: list[Tensor]) -> None:
        """Point every list of ``stage3`` at ``sub_groups`` alone, whose live fp32 partitions are ``masters``."""
        for name, entries in self._lists.items():
            setattr(stage3, name, [entries[i] for i in sub_groups])
        stage3.sub_group_to_group_id = {position: self._param_group_of[i] for position, i in enumerate(sub_groups)}
        stage3.fp32_partitioned_groups_flat = masters
        self.shown, self.shown_units = list(sub_groups), [self.units[i] for i in sub_groups]

    def parameters(self) -> Iterator[tuple[int, Any]]:
        """Every parameter, with its sub-group."""
        for i, group in enumerate(self._lists["fp16_groups"]):
            for parameter in group:
                yield i, parameter

    def require_grad(self, window: Iterable[int]) -> None:
        """Let exactly the parameters of ``window`` require grad, whatever other code (switching adapters) has set."""
        wanted = set(window)
        for i, parameter in self.parameters():
            parameter.requires_grad_(i in wanted)
            if i not in wanted:
                parameter.grad = None

    def mark(self, window: Collection[int]) -> None:
        """Mark parameters that only this engine froze, for the model's next engine; see :func:`policies.apply`."""
        wanted = set(window)
        for i, parameter in self.parameters():
            parameter.lisa_waits = i not in wanted
