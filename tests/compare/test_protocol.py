"""Which runs a comparison takes, in which order, and what is chosen: without training anything."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from lisa_ds.compare.pace import Pace
from lisa_ds.compare.protocol import Progress, Protocol, Run
from lisa_ds.compare.rates import USUAL, grid
from lisa_ds.evidence import Choice

PROTOCOL = Protocol({"full": (1.0, 2.0, 3.0), "lisa": (10.0, 20.0, 30.0)}, seeds=(0, 1), screen_seed=9)
SEARCH = [Run(arm, "rates", 9, rate * times) for rate in (1.0, 2.0, 3.0) for arm, times in (("full", 1), ("lisa", 10))]
BEST = {"full": 2.0, "lisa": 30.0}


def loss(run: Run) -> float:
    return abs(run.rate - BEST[run.arm]) + run.seed


def played(protocol: Protocol = PROTOCOL, closed: tuple[Run, ...] = ()) -> tuple[list[Run], Progress]:
    """All runs in the order of the plan, one at a time."""
    losses: dict[Run, float] = {}
    while runs := Progress(protocol, losses, closed).open():
        losses[runs[0]] = loss(runs[0])
    return list(losses), Progress(protocol, losses, closed)


def test_arms_take_turns_in_the_search_and_within_each_seed() -> None:
    done, progress = played()
    verdict = [Run(arm, "verdict", seed, BEST[arm]) for seed in (0, 1) for arm in ("full", "lisa")]
    assert done == [*SEARCH, *verdict]
    assert len(done) == PROTOCOL.num_runs
    assert Counter(run.part for run in done) == {"select": 6, "verdict": 4}
    assert (progress.choice("full"), progress.choice("lisa")) == (Choice(2.0, False), Choice(30.0, True))


def test_no_verdict_before_every_rate_of_the_arm_was_tried() -> None:
    most = {run: loss(run) for run in SEARCH if run != Run("lisa", "rates", 9, 30.0)}
    progress = Progress(PROTOCOL, most)
    assert progress.choice("lisa") is None
    assert {run.arm for run in progress.open() if run.stage == "verdict"} == {"full"}  # which need not wait
    assert progress.open()[0] == Run("lisa", "rates", 9, 30.0)
    assert progress.left() == {"full": 2, "lisa": 3}


def test_what_failed_or_diverged_is_not_chosen() -> None:
    failed, diverged = Run("full", "rates", 9, 2.0), Run("lisa", "rates", 9, 30.0)
    losses = {run: loss(run) for run in SEARCH if run != failed} | {diverged: math.inf}
    progress = Progress(PROTOCOL, losses, [failed])
    assert progress.choice("full") == Choice(1.0, at_edge=True)
    assert progress.choice("lisa") == Choice(20.0, at_edge=False)


def test_an_arm_that_cannot_run_at_all_does_not_hold_up_the_others() -> None:
    done, progress = played(closed=tuple(run for run in SEARCH if run.arm == "lisa"))
    assert Counter(run.arm for run in done) == {"full": 5}
    assert progress.left() == {"full": 0, "lisa": 0}


def test_a_single_rate_is_not_searched() -> None:
    done, _ = played(Protocol({"full": (2.0,), "lisa": (30.0,)}, seeds=(0, 1), screen_seed=9))
    assert [run.stage for run in done] == ["verdict"] * 4


@pytest.mark.parametrize("method", USUAL)
@pytest.mark.parametrize("tries", [1, 2, 3, 5])
def test_a_grid_is_around_the_usual_value(method: str, tries: int) -> None:
    for parameters, middle in zip((1, 10**10), USUAL[method], strict=True):
        rates = grid(method, parameters, tries)
        assert rates is not None
        assert len(set(rates)) == tries
        assert list(rates) == sorted(rates)
        assert math.prod(rates) ** (1 / tries) == pytest.approx(middle, rel=0.05)
        assert all(b / a == pytest.approx(3, rel=0.07) for a, b in itertools.pairwise(rates))
    assert grid(method, 0, tries) == grid(method, 10**10, tries)
    assert grid("no such method", 1, tries) is None


def test_time_left_and_what_would_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace(deadline_s=60)
    assert pace.in_time("full")  # of which nothing is known
    assert pace.left({"full": 1}, 1) is None
    for seconds in (10, 12, 11):
        pace.took("full", seconds)
    pace.took("lisa", 5)
    assert pace.left({"full": 2, "lisa": 4, "new": 0}, 2) == (2 * 11 + 4 * 5) / 2
    assert pace.expected("new") == 10.5
    now[0] += 47
    assert pace.in_time("full")
    assert not pace.over
    now[0] += 3
    assert not pace.in_time("full")
    assert pace.in_time("lisa")
    now[0] += 10
    assert pace.over
