"""An engine that was destroyed is gone, with its model and its state, however many there were in the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.zero3.lifetime_runs import CASES, run_destroyed_again, run_lifetimes
from tests.zero3.test_trajectory import BOUNDS, differences, reference
from tests.zero3.trajectory import Case

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(("engines", "switches"), [(10, 5), pytest.param(10, 40, marks=pytest.mark.nightly)])
def test_engines_come_and_go_and_nothing_stays(tmp_path: Path, engines: int, switches: int) -> None:
    for rank in run_ranks(2, run_lifetimes, tmp_path, engines, switches, timeout_s=500):
        assert rank["alive"] == [[]] * engines
        first, last = rank["held"][len(CASES)], rank["held"][engines]
        for kind in ("tensors", "python threads", "threads", "file handles"):
            assert last[kind] == first[kind], kind
        assert last["objects"] - first["objects"] < 100
        assert last["resident"] - first["resident"] < 4 * 2**20
        assert "engine" in rank["stock"]  # control: DeepSpeed keeps its own


def test_an_engine_that_is_collected_on_one_rank_does_not_disturb_another(tmp_path: Path) -> None:
    # Frozen embeddings: each switch invalidates the recorded order of fetches.
    case = Case("frozen_embeddings", lisa={"embeddings": "never"})
    ours = run_ranks(2, run_destroyed_again, tmp_path, case, timeout_s=30)[0]
    found = differences(ours, reference(case, 2))
    assert all(found[key] <= BOUNDS[key] for key in BOUNDS), found
