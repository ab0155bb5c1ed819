"""What engines have in common carries an engine that it has never heard of: plain torch DDP, held to the same reference.

And whatever the Protocol says of an engine, that one and the one of ZeRO-3 say alike.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.protocol_runs import Said, run_cases, run_what_engines_say
from tests.ranks import run_ranks
from tests.zero3.test_trajectory import BOUNDS, differences, layers_of
from tests.zero3.trajectory import LAYERS, Case, Outcome, reference, roles_in
from tests.zero3.trajectory_cases import EXACT

pytestmark = pytest.mark.multirank

NAMES = (
    *(
        "plain",
        "accumulation",
        "no_clip",
        "scheduler",
        "tied",
        "frozen_embeddings_reentrant",
        "only_blocks",
        "lr_scales",
    ),
    *("bernoulli", "cyclic", "roles_every", "roles_sampled", "rewarm", "limit", "with_all_care"),
)
CASES = [case for case in EXACT if case.name in NAMES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    return run_ranks(2, run_cases, tmp_path_factory.mktemp("ddp"), CASES, timeout_s=300)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trajectory_equals_torch(runs: list[dict[str, Outcome]], case: Case) -> None:
    first, second = (rank[case.name] for rank in runs)
    theirs = reference(case, 2, layers_of(case))
    assert first.layers == second.layers == theirs.layers
    assert first.extra["history"] == second.extra["history"]
    found = differences(first, theirs)
    assert all(found[key] <= BOUNDS[key] for key in BOUNDS), found


def test_moments_are_those_of_what_trains(runs: list[dict[str, Outcome]]) -> None:
    ours = runs[0]["only_blocks"]
    block = sum(p.numel() for name, p in ours.parameters.items() if ".layers.0." in name)
    assert ours.extra["report"]["exp_avg"] in (4 * 2 * block, 4 * block)  # right after a switch, of a block that stays
    assert LAYERS > 2


def test_every_case_is_there() -> None:
    assert {case.name for case in CASES} == {*NAMES}


BOTH = [case for case in CASES if case.name in ("accumulation", "roles_every", "with_all_care")]
# A loss scale, and gradients on the host: what the engine of ZeRO-3 alone can have.
SCALED = Case("scaled", dtype="fp16", steps=4)
OF_ZERO3 = [SCALED, *(case for case in EXACT if case.name == "cpu_offload_accumulation")]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Said]]:
    return run_ranks(2, run_what_engines_say, tmp_path_factory.mktemp("said"), BOTH, OF_ZERO3, timeout_s=300)


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_engines_say_the_same(said: list[dict[tuple[str, str], Said]], case: Case) -> None:
    ddp, zero3 = (said[0][name, case.name] for name in ("ddp", "zero3"))
    assert len(ddp.steps) == len(zero3.steps) == case.steps
    for ours, theirs in zip(zero3.steps, ddp.steps, strict=True):
        assert (ours.layers, ours.roles) == (theirs.layers, theirs.roles)
        assert ours.squares == pytest.approx(theirs.squares, rel=1e-4)
        assert {unit: count for unit, (count, _) in ours.state.items()} == {u: n for u, (n, _) in theirs.state.items()}
        squares = [{unit: square for unit, (_, square) in each.state.items()} for each in (ours, theirs)]
        assert squares[0] == pytest.approx(squares[1], rel=1e-4)


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_state_is_that_of_what_trains(said: list[dict[tuple[str, str], Said]], engine: str, case: Case) -> None:
    first, second = (rank[engine, case.name] for rank in said)
    ages: dict[Any, int] = {}
    for number, (step, other) in enumerate(zip(first.steps, second.steps, strict=True)):
        assert step.squares == other.squares  # on all ranks alike
        assert step.roles == roles_in(case, number // case.interval_steps)
        trains = {*step.layers, *step.roles}
        assert step.squares.keys() == step.state.keys() == trains
        ages = {unit: age + 1 for unit, age in ages.items() if unit in trains} | {u: 0 for u in trains - ages.keys()}
        for unit, (steps, square) in step.state.items():
            assert steps == ages[unit]
            assert (square > 0) == (steps > 0)
        if not case.lisa.get("norm_growth_limit"):
            assert sum(step.squares.values()) ** 0.5 == pytest.approx(step.norm, rel=1e-6)
    assert max(ages.values()) == case.steps - 1  # of what trained from the first step on


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_switch_releases_what_leaves(said: list[dict[tuple[str, str], Said]], engine: str) -> None:
    for rank, answers in enumerate(said):
        switched = answers[engine, BOTH[0].name].switched
        assert switched.ranks == ["0", "1"], rank
        last, goes, stays, comes = switched.before, switched.goes, switched.stays, switched.comes
        assert last[goes] > 0 < last[stays]
        assert switched.after == {stays: last[stays], comes: 0}
        assert switched.again == {goes: 0, stays: last[stays]}
        assert switched.present == ("embeddings", "lm_head", "rest")
        assert switched.exp_avg[1] < switched.exp_avg[0]  # bytes before and after
        assert switched.exp_avg[2] == switched.exp_avg[1]  # what has come back has no moments yet


@pytest.mark.parametrize("case", OF_ZERO3, ids=lambda case: case.name)
def test_squares_are_those_of_the_whole_gradient(said: list[dict[tuple[str, str], Said]], case: Case) -> None:
    for step in said[0]["zero3", case.name].steps:
        assert sum(step.squares.values()) ** 0.5 == pytest.approx(step.norm, rel=1e-6)
