"""Simulates DeepSpeed's parameter coordinator: which parameters ZeRO-3 has gathered at each moment of a step.

It follows ``deepspeed/runtime/zero/partitioned_param_coordinator.py`` (0.19) from the second step on, when the order in
which modules run is known. A module's parameters are gathered before it runs, together with those of the modules after
it, up to ``stage3_prefetch_bucket_size`` elements. They are released afterwards unless they are needed again within
``stage3_max_reuse_distance`` elements. Parameters of at most ``stage3_param_persistence_threshold`` elements are never released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lisa_ds.memory.ledger import Ledger


@dataclass(frozen=True)
class GatherSettings:
    """Keys of ``zero_optimization``, with DeepSpeed's defaults."""

    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000


@dataclass
class _Group:
    """Parameters of one all-gather: a flat buffer, from which all are copied out when the first is waited for."""

    name: str
    parameters: list[int]
    size: int
    waiting: set[int]
    complete: bool = False


@dataclass
class Coordinator:
    """Books gathers and releases of parameters in a ledger, in the order in which DeepSpeed makes them.

    Args:
        numels: Elements of each parameter.
        visits: The parameters of each module, in the order in which modules run forwards and then backwards.
        world_size: Ranks that share them.
        width: Bytes of an element.
        settings: Limits of prefetch, reuse and persistence.
        ledger: Where bytes are booked.
    """

    numels: Mapping[int, int]
    visits: Sequence[tuple[int, ...]]
    world_size: int
    width: int
    settings: GatherSettings
    ledger: Ledger
    _step: int = 0
    _available: set[int] = field(default_factory=set)
    _in_flight: dict[int, _Group] = field(default_factory=dict)
    _last_fetched_for: dict[int, int] = field(default_factory=dict)
    _groups: int = 0

    def __post_init__(self) -> None:
        threshold = self.settings.param_persistence_threshold
        self._persistent = {number for number, numel in self.numels.items() if numel <= threshold}
        self._available |= self._persistent
        self._queue = deque((number, step) for step, visit in enumerate(self.visits) for number in visit)
        self._num_available = 0
        self._size = [sum(self.numels[number] for number in visit) for visit in self.visits]
        if self.world_size > 1:
            self.ledger.add("gathered/persistent", sum(self.numels[number] for number in self._persistent) * self.width)

    def fetch(self) -> None:
        """Gather what the next module needs, before it runs, and prefetch."""
        wanted = self.visits[self._step]
        if self.world_size == 1:
            self._step += 1
            return
        self._gather([number for number in wanted if not self._is_here(number)])
        for number in wanted:
            if group := self._in_flight.pop(number, None):
                self._wait(number, group)
        fresh = {number for number in wanted if self._last_fetched_for.get(number, -1) < self._step}
        found: set[int] = set()
        while self._queue and len(found) < len(fresh):
            number, step = self._queue.popleft()
            self._last_fetched_for[number] = step
            found.add(number)
        self._prefetch()
        self._step += 1

    def release(self, visit: int) -> None:
        """Release what the module of ``visit`` has used, after it has run."""
        if self.world_size == 1:
            return
        candidates = {number for number in self.visits[visit] if number not in self._persistent}
        candidates -= {number for number in candidates if self._last_fetched_for.get(number, -1) > self._step}
        traversed = 0
        for step in range(self._step, len(self.visits)):
            if not candidates or traversed >= self.settings.max_reuse_distance:
                break
            candidates.difference_update(self.visits[step])
            traversed += self._size[step]
        for number in candidates & self._available:
            self._available.discard(number)
            self._num_available -= self.numels[number]
            self.ledger.drop(f"gathered/{number}")

    def _is_here(self, number: int) -> bool:
        return number in self._available or number in self._in_flight

    def _prefetch(self) -> None:
        room = min(self.settings.max_live_parameters - self._num_available, self.settings.prefetch_bucket_size)
        ahead: dict[int, None] = {}
        elements = 0
        while self._queue and elements < room:
            number, step = self._queue.popleft()
            self._last_fetched_for[number] = max(self._last_fetched_for.get(number, -1), step)
            if number not in ahead and not self._is_here(number):
                ahead[number] = None
                elements += self.numels[number]
        self._gather(list(ahead))

    def _gather(self, numbers: list[int]) -> None:
        if not numbers:
            return
        self._num_available += sum(self.numels[number] for number in numbers)
        padded = {number: -(-self.numels[number] // self.world_size) * self.world_size for number in numbers}
        if len(numbers) == 1:  # straight into the parameter
            self.ledger.add(f"gathered/{numbers[0]}", padded[numbers[0]] * self.width)
            group = _Group("", numbers, 0, set(numbers), complete=True)
        else:
            self._groups += 1
            group = _Group(f"prefetched/{self._groups}", numbers, sum(padded.values()) * self.width, set(numbers))
            self.ledger.add(group.name, group.size)
        self._in_flight.update(dict.fromkeys(numbers, group))

    def _wait(self, number: int, group: _Group) -> None:
        if not group.complete:
            group.complete = True
            for other in group.parameters:
                self.ledger.add(f"gathered/{other}", self.numels[other] * self.width)
        self._available.add(number)
        group.waiting.discard(number)
        if not group.waiting:
            self.ledger.drop(group.name)
