"""torch.compile changes nothing about a run, and compiles a bounded number of graphs however often it switches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.zero3.compile_runs import run_compiled

pytestmark = [pytest.mark.multirank, pytest.mark.nightly]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_run_is_the_eager_one(tmp_path: Path, backend: str) -> None:
    for eager, compiled in run_ranks(2, run_compiled, tmp_path, [None, backend], timeout_s=900):
        assert len(set(compiled["layers"])) > 2  # it did switch
        assert compiled["layers"] == eager["layers"]
        assert compiled["losses"] == pytest.approx(eager["losses"], abs=1e-6)
        assert eager["graphs"][-1] == 0 < compiled["graphs"][0]
        assert compiled["graphs"][-1] == compiled["graphs"][0]  # a switch compiles nothing anew
