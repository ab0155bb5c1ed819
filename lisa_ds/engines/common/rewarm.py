"""Learning-rate warm-up after a switch: the rate of a unit that begins to train rises over its first steps.

Such a unit has no moments, and Adam's first steps without them are as large as the rate allows, whatever the gradient.
Its k-th step (from 0) is therefore taken at (k+1)/n of the rate, until k+1 = n.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lisa_ds.layers import Unit


class Rewarm:
    """The warm-up; counts the steps of each unit since it began to train.

    Args:
        steps: Steps n of a warm-up; 0 for none.
        always: Units that train in every interval, which have no warm-up.
    """

    def __init__(self, steps: int = 0, always: Collection[Unit] = ()) -> None:
        self._steps, self._always = steps, frozenset(always)
        self._ages: dict[Unit, int] = {}  # of the units that train

    def keep(self, units: Iterable[Unit]) -> None:
        """Set the units that train to ``units``: those that trained before keep their count, others begin a warm-up."""
        self._ages = {unit: self._ages.get(unit, 0) for unit in units}

    def begin_anew(self) -> None:
        """Restart the warm-up of every unit: its moments are gone."""
        self._ages = dict.fromkeys(self._ages, 0)

    def stepped(self) -> None:
        """Record that a step was applied, not skipped for overflow."""
        self._ages = {unit: age + 1 for unit, age in self._ages.items()}

    def share(self, unit: Unit) -> float:
        """Warm-up factor on the learning rate of ``unit`` in its next step."""
        step = self._ages.get(unit, 0) + 1
        return 1.0 if step >= self._steps or unit in self._always else step / self._steps

    def state_dict(self) -> dict[Unit, int]:
        """The counts, as plain values."""
        return dict(self._ages)

    def load_state_dict(self, ages: Mapping[Unit, int] | None) -> None:
        """Restore from a checkpoint, for the units that train now; without counts in it, no unit warms up."""
        self._ages = {unit: self._steps if ages is None else ages.get(unit, 0) for unit in self._ages}
