"""Which runs a comparison takes, and which may start next: a function of what has been measured so far.

Nothing here knows how a run is done. In the stage ``rates`` every arm tries as many learning rates as any other, with a seed of its own,
and is measured on the held-out part ``select``. In the stage ``verdict`` it trains at the best of them with every seed of the
verdict, and is measured on the part ``verdict``. Arms take turns, so that whatever there is when time runs out is paired, and a machine
that grows slower does so for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lisa_ds.evidence import SELECT, VERDICT, Choice, choose

STAGES = {"rates": SELECT, "verdict": VERDICT}
"""Each stage with the held-out part that it is measured on."""

TRIES = 3
"""Learning rates of an arm, if nothing says how many."""

SCREEN_SEED = 1000
"""Seed of the search for learning rates, if none is given."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    arm: str
    stage: str
    seed: int
    rate: float

    @property
    def part(self) -> str:
        """The held-out part it is measured on."""
        return STAGES[self.stage]


@dataclass(frozen=True)
class Protocol:
    """How much of everything; equal for all arms."""

    rates: Mapping[str, tuple[float, ...]]
    """By the name of an arm, the learning rates that it tries: as many for all of them."""

    seeds: tuple[int, ...]
    """Of the verdict."""

    screen_seed: int
    """Of the choice of learning rates; not among :attr:`seeds`."""

    @property
    def searches(self) -> bool:
        """Whether there is anything to choose."""
        return max(map(len, self.rates.values())) > 1

    @property
    def num_runs(self) -> int:
        """All runs of all stages."""
        return sum((len(rates) if self.searches else 0) + len(self.seeds) for rates in self.rates.values())


class Progress:
    """What follows from the results so far.

    Args:
        protocol: How much of everything.
        losses: The held-out loss after training of each run that has ended; not finite where training diverged.
        closed: Runs that will give no result.
    """

    def __init__(self, protocol: Protocol, losses: Mapping[Run, float], closed: Collection[Run] = ()) -> None:
        self.protocol, self.losses, self.closed = protocol, losses, closed

    def search(self, arm: str) -> list[Run]:
        """The runs that find the learning rate of an arm."""
        if not self.protocol.searches:
            return []
        return [Run(arm, "rates", self.protocol.screen_seed, rate) for rate in self.protocol.rates[arm]]

    def choice(self, arm: str) -> Choice | None:
        """The learning rate with the lowest loss; None until all have been tried, and where every one diverged or failed."""
        runs = self.search(arm)
        if not runs:
            return Choice(self.protocol.rates[arm][0], at_edge=False)
        if not all(self._settled(run) for run in runs):
            return None
        chosen = choose({run.rate: self.losses.get(run, math.inf) for run in runs})
        return chosen

    def verdict(self, arm: str) -> list[Run]:
        """The runs that judge an arm, seed by seed; nothing before its learning rate is chosen."""
        choice = self.choice(arm)
        return [] if choice is None else [Run(arm, "verdict", seed, choice.rate) for seed in self.protocol.seeds]

    def open(self) -> list[Run]:
        """Runs that could start now and have neither ended nor failed, the most urgent first."""
        searches = [self.search(arm) for arm in self.protocol.rates]
        verdicts = [self.verdict(arm) for arm in self.protocol.rates]
        wanted = [run for runs in (searches, verdicts) for turn in _turns(runs) for run in turn]
        return [run for run in wanted if not self._settled(run)]

    def left(self) -> dict[str, int]:
        """By arm, how many runs have neither ended nor failed, those included that cannot start yet."""
        left = {}
        for arm in self.protocol.rates:
            searched = [run for run in self.search(arm) if not self._settled(run)]
            over = not searched and self.choice(arm) is None  # no learning rate, so no verdict
            verdicts = [run for run in self.verdict(arm) if not self._settled(run)]
            waiting = len(self.protocol.seeds) if searched else len(verdicts)
            left[arm] = 0 if over else len(searched) + waiting
        return left

    def _settled(self, run: Run) -> bool:
        return run in self.losses or run in self.closed


def _turns(runs: list[list[Run]]) -> list[list[Run]]:
    """The first run of each arm, then the second of each, and so on."""
    longest = max(map(len, runs), default=0)
    return [[of_arm[i] for of_arm in runs if i < len(of_arm)] for i in range(longest)]
