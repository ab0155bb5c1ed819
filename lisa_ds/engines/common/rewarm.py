"""Re-warm-up: the learning rate of what has come in at a switch rises over its first steps.

A unit that comes in has no moments, and Adam's first steps from none are as large as the rate allows, whatever the gradient. Its k-th step
(from 0) is therefore taken at (k+1)/n of the rate, until k+1 = n.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lisa_ds.layers import Unit


class Rewarm:
    """Knows how many steps each unit has taken since it came in.

    Args:
        steps: Steps over which a rate rises; 0 for none.
        always: Units that train in every interval, whose rates do not rise.
    """

    def __init__(self, steps: int = 0, always: Collection[Unit] = ()) -> None:
        self._steps, self._always = steps, frozenset(always)
        self._ages: dict[Unit, int] = {}  # of the units that train

    def keep(self, units: Iterable[Unit]) -> None:
        """Make ``units`` those that train: who was among them before grows older, who was not begins."""
        self._ages = {unit: self._ages.get(unit, 0) for unit in units}

    def begin_anew(self) -> None:
        """Let every unit that trains begin: its moments are gone."""
        self._ages = dict.fromkeys(self._ages, 0)

    def stepped(self) -> None:
        """Note that a step was taken; one that was skipped for overflow is none."""
        self._ages = {unit: age + 1 for unit, age in self._ages.items()}

    def share(self, unit: Unit) -> float:
        """Share of its learning rate that ``unit`` has in its next step."""
        step = self._ages.get(unit, 0) + 1
        return 1.0 if step >= self._steps or unit in self._always else step / self._steps

    def state_dict(self) -> dict[Unit, int]:
        """Plain values."""
        return dict(self._ages)

    def load_state_dict(self, ages: Mapping[Unit, int] | None) -> None:
        """Go on from a checkpoint, for the units that train now; of one without ages, everything in it was trained for long."""
        self._ages = {unit: self._steps if ages is None else ages.get(unit, 0) for unit in self._ages}
