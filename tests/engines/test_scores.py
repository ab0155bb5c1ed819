"""The arithmetic of scores, against the same written out."""

from __future__ import annotations

import pytest
import torch

from lisa_ds.config.sampler import SamplerConfig
from lisa_ds.config.sampler_kinds import PROBES
from lisa_ds.engines.common import scores
from lisa_ds.errors import EngineError


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kinds_are_what_samplers_measure() -> None:
    sections = ({"name": "grad_norm"}, {"name": "grad_norm", "score": "mean"}, {"name": "fisher"})
    found = [SamplerConfig.model_validate(section).kind.probe for section in sections]
    found.append(SamplerConfig.model_validate({"name": "fisher", "estimator": "hutchinson"}).kind.probe)
    assert tuple(found) == PROBES


def test_blocks_come_a_few_at_a_time_where_something_is_held_for_each() -> None:
    assert [list(blocks) for blocks in scores.passes(5, "accumulated", 2)] == [[0, 1], [2, 3], [4]]
    assert [list(blocks) for blocks in scores.passes(5, "hutchinson", 5)] == [[0, 1, 2, 3, 4]]
    for kind in ("mean", "empirical"):
        assert [list(blocks) for blocks in scores.passes(5, kind, 1)] == [[0, 1, 2, 3, 4]]
    with pytest.raises(EngineError, match=r"^probe: there is no kind 'ema'; use one of accumulated, mean, "):
        scores.passes(5, "ema", 1)


def test_squares_are_added_up_in_double() -> None:
    total = doubles(1.0)[0]
    values = torch.full((2**20 + 3,), 0.1)
    scores.add_squares(values, total)
    assert float(total) == pytest.approx(1 + (2**20 + 3) * float(values[0].double()) ** 2, rel=1e-10)


def test_numbers_of_what_was_collected() -> None:
    # Two blocks of two parameters and one, gradients summed over 2 ranks: (3 + 4) / 2 and 6 / 2.
    assert scores.summed_norms(doubles(9, 16, 36), [2, 1], 2) == [3.5, 3.0]
    assert scores.summed_norms(doubles(9), [0, 1], 1) == [0, 3.0]  # a block without parameters that train
    # Two batches of two blocks: the mean of norms, not the norm of the mean.
    assert scores.mean_norms(torch.stack([doubles(4, 16), doubles(36, 0)]), 2) == [2.0, 1.0]
    assert scores.means(doubles(12, 6), 3, 2) == [2.0, 1.0]
    assert scores.curvatures([3.0, -1.0], [1.0, 1.0], 0.5) == [2.0, -2.0]


def test_numbers_of_all_blocks() -> None:
    assert scores.of_weights({"embeddings": 9.0, 0: 1.0, 1: 2.0, "rest": 3.0}, 2) == [1.0, 2.0]
    assert scores.drawable([-0.5, 2.0]) == [0.0, 2.0]
    scores.check_finite([0.0, -1.0], "hutchinson")
    with pytest.raises(EngineError, match=r"^the scores \(mean\) of layers \[1, 2\] are not finite: "):
        scores.check_finite([1.0, float("nan"), float("inf")], "mean")
