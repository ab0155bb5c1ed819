"""What the ZeRO-3 engine keeps alive: flat over switches, and no input of a frozen linear."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.zero3.memory_runs import (
    run_activations,
    run_many_switches,
    run_uneven_switches,
    run_with_frozen_parameters,
)
from tests.zero3.trajectory import Case

pytestmark = pytest.mark.multirank

SWITCHES = 100


@pytest.mark.more
def test_memory_is_flat_over_a_hundred_switches(tmp_path: Path) -> None:
    case = Case("flat", interval_steps=1, width=4)  # wide, so that a leaked state would be seen in the resident bytes
    # Looked at after each fifth step: with the embeddings and without, with the head and without.
    comes_and_goes = {"embeddings": {"every": 2}, "lm_head": {"every": 3}, "rewarm_steps": 3, "norm_growth_limit": 1.1}
    cases = [(case, SWITCHES), (replace(case, name="roles", lisa=comes_and_goes), SWITCHES // 2)]
    for seen_by_case in run_ranks(2, run_many_switches, tmp_path, cases, timeout_s=360):
        for (_, switches), seen in zip(cases, seen_by_case, strict=True):
            assert seen[-1]["switches"] == switches + 1
            assert len({step["layers"] for step in seen}) > 5
            warm = seen[4:]
            assert len({step["hooks"] for step in warm}) == 1
            present = {step["roles"] for step in seen}
            assert len(present) == (1 if switches == SWITCHES else 4)
            for roles in present:
                alike = [step for step in seen if step["roles"] == roles]
                kinds = [{k: v for k, v in step["report"].items() if "exp_avg" not in k} for step in alike]
                assert all(kind == kinds[0] for kind in kinds)
                # A unit drawn twice in a row keeps its two moments and its step count, and the norm of its gradient; nothing
                # else may come or go.
                assert len({_others(step) for step in alike if step in warm}) <= 1
            resident = [step["resident"] for step in warm]
            assert resident[-1] - resident[0] < 8 * 2**20


def _others(step: dict[str, Any]) -> int:
    return int(step["tensors"] - 3 * step["states"] - step["norms"])


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


UNEVEN: dict[
    str, tuple[dict[str, Any], int]
] = {  # with the bytes of an element that are there only while it is cast to fp32
    "bf16": ({}, 4),
    "adamw": ({"lisa": {"optimizer": "adamw"}}, 4),
    "fp32 accumulation": ({"gradients": "fp32"}, 4),
    "fp32": ({"bf16": False}, 0),
    "no master copy": ({"lisa": {"optimizer": {"precision": "stochastic_rounding"}}}, 0),
    "offload": ({"zero": {"offload_optimizer": {"device": "cpu"}}}, 4),
}


def test_a_switch_drops_the_old_gradients_before_it_allocates(tmp_path: Path) -> None:
    cases = [case for case, _ in UNEVEN.values()]
    for rank in run_ranks(2, run_uneven_switches, tmp_path, cases):
        for (name, (_, cast)), seen in zip(UNEVEN.items(), rank, strict=True):
            before, after = seen["before"], seen["after"]
            states = ("gradients", "master", "exp_avg", "exp_avg_sq")
            others = seen["start"] - sum(before[kind] for kind in states)
            largest = max(after["gradients"], cast * after["weights"] * 8 // 9 // (4 if name == "fp32" else 2))
            peak = others + after["master"] + largest
            assert before["gradients"] > 4000 < after["gradients"] / 4, name
            assert seen["peak"] == pytest.approx(max(peak, seen["start"]), abs=1000), name
