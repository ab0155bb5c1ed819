"""Choices among what was tried, paired differences, and what may be said of several of them."""

from __future__ import annotations

import math

import pytest

from lisa_ds.evidence import Choice, Gap, choose, holding, pairs, t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"), [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.95, 30, 1.697)]
)
def test_quantiles_of_t(probability: float, degrees: int, quantile: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(quantile, abs=1e-3)


@pytest.mark.parametrize(
    ("tried", "choice"),
    [
        ({1.0: 3.0, 2.0: 1.0, 3.0: 2.0}, Choice(2.0, at_edge=False)),
        ({1.0: 0.5, 2.0: 1.0, 3.0: 2.0}, Choice(1.0, at_edge=True)),
        ({1.0: 3.0, 2.0: 2.0, 3.0: 1.0}, Choice(3.0, at_edge=True)),
        ({1.0: 3.0, 2.0: 1.0, 3.0: math.inf}, Choice(2.0, at_edge=False)),  # beyond it, training diverges
        ({1.0: 1.0, 2.0: 1.0, 3.0: 1.0}, Choice(1.0, at_edge=True)),
        ({1.0: 1.0}, Choice(1.0, at_edge=False)),  # nothing was searched
        ({1.0: math.nan, 2.0: math.inf}, None),
        ({}, None),
    ],
)
def test_a_choice(tried: dict[float, float], choice: Choice | None) -> None:
    assert choose(tried) == choice


def test_pairs_are_of_common_seeds() -> None:
    assert pairs({0: 1.0, 2: 5.0, 1: 2.0}, {1: 1.5, 0: 0.5, 7: 9.0}) == Gap((0.5, 0.5))
    assert pairs({0: 1.0}, {1: 1.0}) is None


def test_an_interval_by_hand() -> None:
    gap = Gap((1.0, 2.0, 3.0))
    assert gap.half_width() == pytest.approx(4.303 * 1.0 / math.sqrt(3), abs=1e-3)
    assert str(gap) == "+2.0000 [-0.4841, +4.4841]"
    assert str(Gap((1.0,))) == "+1.0000"


def test_several_hold_together_at_a_level_of_their_own() -> None:
    clear, weak, none = Gap((1.0, 1.001, 1.002)), Gap((1.0, 1.2, 1.4)), Gap((-1.0, 1.0, 0.1))
    found = holding([clear, weak, none, *[none] * 17])
    assert (found.alone, found.together, found.level) == ([0, 1], [0], 1 - 0.05 / 20)
    assert holding([weak]).together == [0]  # alone it holds at 95 %
    assert not holding([Gap((5.0,))]).alone  # of one pair nothing can be said
