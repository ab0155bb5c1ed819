"""What the ZeRO-3 engine keeps alive: flat over switches, and no input of a frozen linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.trajectory import Case
from tests.zero3_memory_runs import run_activations, run_many_switches, run_with_frozen_parameters

pytestmark = pytest.mark.multirank

SWITCHES = 100


def test_memory_is_flat_over_a_hundred_switches(tmp_path: Path) -> None:
    case = Case("flat", interval_steps=1, width=4)  # wide, so that a leaked state would be seen in the resident bytes
    for seen in run_ranks(2, run_many_switches, tmp_path, case, SWITCHES, timeout_s=240):
        assert seen[-1]["switches"] == SWITCHES + 1
        assert len({step["layers"] for step in seen}) > 5
        warm = seen[4:]
        assert len({step["hooks"] for step in warm}) == 1
        kinds = [{k: v for k, v in step["report"].items() if "exp_avg" not in k} for step in seen]
        assert all(kind == kinds[0] for kind in kinds)
        # A block drawn twice in a row keeps its two moments and its step count; nothing else may come or go.
        assert len({step["tensors"] - 3 * step["states"] for step in warm}) == 1
        resident = [step["resident"] for step in warm]
        assert resident[-1] - resident[0] < 8 * 2**20


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, run_activations, tmp_path_factory.mktemp("activations"), Case("activations", clip=0.0))[0]


def test_frozen_linears_keep_no_input(activations: dict[str, Any]) -> None:
    saved = {name: measured[0] for name, measured in activations.items()}
    assert saved["ours, 2 of 8"] <= 0.80 * saved["stock, 8 of 8"], saved
    assert saved["ours, 2 of 8"] < 0.85 * saved["stock, 2 of 8"], saved
    assert saved["ours, 8 of 8"] == saved["stock, 8 of 8"], saved


def test_losses_do_not_change_by_it(activations: dict[str, Any]) -> None:
    losses = {name: measured[1] for name, measured in activations.items()}
    assert losses["ours, 8 of 8"] == losses["stock, 8 of 8"]
    assert losses["ours, 2 of 8"] == losses["stock, 2 of 8"]


def test_parameters_frozen_by_the_user_stay_frozen_and_out_of_the_count(tmp_path: Path) -> None:
    for seen in run_ranks(2, run_with_frozen_parameters, tmp_path):
        assert seen["bytes_as_planned"]
        assert seen["frozen_moved"] == []
        assert seen["frozen_requires_grad"] == []
        assert seen["moved"] > 0
