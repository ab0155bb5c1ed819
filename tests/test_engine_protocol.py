"""What engines have in common carries an engine that it has never heard of: plain torch DDP, held to the same reference."""

from __future__ import annotations

import pytest

from tests.ddp_engine import run_cases
from tests.ranks import run_ranks
from tests.test_zero3_trajectory import BOUNDS, EXACT, differences, layers_of
from tests.trajectory import LAYERS, Case, Outcome, reference

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
