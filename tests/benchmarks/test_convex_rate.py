"""The rate of LISA on a convex problem, small; and two ways to train that must be seen not to converge."""

from __future__ import annotations

import convex_rate
import numpy as np
import pytest
from convex_rate import Arm

STEPS, SEEDS = 1500, range(2)


@pytest.fixture(scope="module")
def problem() -> convex_rate.Problem:
    return convex_rate.Problem()


def test_the_minimum_is_one(problem: convex_rate.Problem) -> None:
    assert problem.minimum == pytest.approx(problem.bound, abs=1e-10)  # nothing lies below the dual's bound
    random = np.random.default_rng(1)
    around = problem.solution + 1e-3 * random.standard_normal((1000, problem.solution.size))
    assert problem.value(around).min() > problem.minimum


def test_subgradients_support_the_function(problem: convex_rate.Problem) -> None:
    here, there = np.random.default_rng(2).standard_normal((2, 50, problem.solution.size))
    all_rows = np.tile(np.arange(convex_rate.ROWS), (50, 1))
    slopes = problem.subgradient(here, all_rows)
    assert (problem.value(there) >= problem.value(here) + ((there - here) * slopes).sum(1) - 1e-12).all()


def test_a_slope_is_found_again() -> None:
    marks = convex_rate.marks_of(10_000)
    gaps = np.outer(np.array(marks) ** -0.5, [1.0, 3.0, 9.0])
    mean, half = convex_rate.slope(marks, gaps)
    assert mean == pytest.approx(-0.5)
    assert half == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("gamma", [4, convex_rate.BLOCKS])
def test_the_mean_gap_falls_like_one_over_the_root_of_steps(problem: convex_rate.Problem, gamma: int) -> None:
    first, last, slope = outcome(problem, Arm("lisa", gamma))
    assert last < 0.6 * first
    assert -0.85 < slope < -0.35


@pytest.mark.parametrize(
    "arm",
    [Arm("blocks that are never drawn", 4, sampler="fixed"), Arm("a rate that does not fall", 4, falling=False)],
    ids=lambda arm: arm.name,
)
def test_controls_do_not_close_the_gap(problem: convex_rate.Problem, arm: Arm) -> None:
    first, last, slope = outcome(problem, arm)
    assert last > first / 3
    assert slope > -0.25


def outcome(problem: convex_rate.Problem, arm: Arm) -> tuple[float, float, float]:
    """Mean gap at step 100 and at the end, and the slope between."""
    marks = convex_rate.marks_of(STEPS, first=100)
    gaps = convex_rate.train(problem, arm, STEPS, SEEDS, marks)["mean_gap"]
    return float(gaps[0].mean()), float(gaps[-1].mean()), convex_rate.slope(marks, gaps)[0]
