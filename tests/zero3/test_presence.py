"""A parameter without a gradient takes no step: trajectories against torch.optim.AdamW in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.zero3.presence_runs import Case, Model, reference, trained

pytestmark = pytest.mark.multirank

CASES = [
    Case("fused"),
    Case("fused, accumulating", accumulation=2),
    Case("fused, accumulating, offloaded", accumulation=2, offload=True),
    Case("fused, recomputing, resumed", recompute=True, stop_at=6),
    Case("adamw", optimizer="adamw"),
    Case("adamw, accumulating, offloaded", optimizer="adamw", accumulation=2, offload=True),
    Case("adamw, accumulating, resumed", optimizer="adamw", accumulation=2, stop_at=6),
]


def differences(case: Case, ranks: int, result: tuple) -> dict[str, float]:
    sampled, weights, _ = result
    expected = reference(case, ranks, sampled)
    return {name: float((weights[name] - expected[name]).abs().max()) for name in expected}


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, CASES), pytest.param(3, CASES[:1] + CASES[-2:], marks=pytest.mark.more)]
)
def test_it_trains_as_adamw_in_one_process(ranks: int, cases: list[Case], tmp_path: Path) -> None:
    for rank in run_ranks(ranks, trained, tmp_path, cases, str(tmp_path)):
        for case in cases:
            found = differences(case, ranks, rank[case.name])
            assert max(found.values()) < 2e-6, (case.name, {k: v for k, v in found.items() if v >= 2e-6})
    start = Model(CASES[0]).state_dict()
    moved = {name for name, weight in rank["fused"][1].items() if not torch.equal(weight, start[name])}
    assert not {name for name in moved if "never" in name or "tower" in name or "experts.2" in name}
    assert {name for name in moved if "every_other" in name}
    assert {f"mixture.experts.{i}.weight" for i in (0, 1, 3)} <= moved


def test_stock_zero_3_does_otherwise(tmp_path: Path) -> None:
    """The control, and what the documentation says of stock ZeRO-3."""
    plain, late = Case("stock", leaf=False), Case("stock, accumulating", accumulation=2, leaf=False)
    hosted = Case("stock, offloaded", accumulation=2, offload=True, leaf=False)
    results = run_ranks(2, trained, tmp_path, [plain, late, hosted], str(tmp_path), False)[0]
    start = Model(plain).state_dict()
    for case in (plain, late, hosted):
        weights = results[case.name][1]
        # never a gradient: decay alone, which AdamW would not have applied
        torch.testing.assert_close(weights["layers.0.never.weight"], start["layers.0.never.weight"] * (1 - 1e-3) ** 9)
    off = {case.name: differences(case, 2, results[case.name]) for case in (plain, late, hosted)}
    assert off["stock"]["layers.0.every_other.weight"] > 1e-3  # stepped with the gradient of the step before
    assert off["stock, accumulating"]["layers.0.last.weight"] > 1e-3  # added to the gradient of the step before
    assert off["stock, offloaded"]["layers.0.first.weight"] > 1e-3  # never brought to the host
