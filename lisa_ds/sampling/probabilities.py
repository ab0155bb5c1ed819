"""Turns scores of blocks into the probability with which each is drawn.

There are two ways to draw by scores. *Systematic* draws have given inclusion probabilities: those are computed first,
by :func:`inclusion_probabilities`, and the draw meets them exactly. *Successive* draws pick one block after the other,
each time with probability proportional to the scores of those that are left; the resulting inclusion probabilities,
from :func:`successive_inclusion_probabilities`, are flatter than the scores. Both are pure functions, the same on every
rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

_LOG_RANGE = 600.0  # exp(-600) is still a float
_NODES = 6  # of the quadrature below, for each e-fold of time: errors under 1e-6, held by a test


def weights(scores: Sequence[float], temperature: float | None = None) -> tuple[float, ...]:
    """Shares of the blocks, which sum to one: proportional to their scores, or a softmax of these.

    Args:
        scores: Not negative.
        temperature: None for shares proportional to the scores. Else ``softmax(score / (temperature * mean score))``: high
            temperatures come close to equal shares, low ones to the highest score alone; the scores' own unit does not matter.

    Returns:
        As many shares as scores. Equal ones if all scores are zero.

    Raises:
        ValueError: A score is negative or not finite.

    Example:
        >>> weights([3.0, 1.0])
        (0.75, 0.25)
    """
    if not scores or not all(math.isfinite(score) and score >= 0 for score in scores):
        raise ValueError(f"weights: scores should be finite and not negative, got {list(scores)}")
    largest = max(scores)
    if largest == 0:
        return (1 / len(scores),) * len(scores)
    # By the largest first: neither sums of huge scores nor those of tiny ones leave the range of a float.
    relative = [score / largest for score in scores]
    if temperature is not None:
        scale = temperature * math.fsum(relative) / len(relative)
        scale = max(
            scale, (1.0 - min(relative)) / _LOG_RANGE
        )  # lower ones would make zeros, and so ties, of small shares
        relative = [math.exp((score - 1.0) / scale) for score in relative]
    total = math.fsum(relative)
    return tuple(score / total for score in relative)


def inclusion_probabilities(shares: Sequence[float], num_sampled: int, floor: float = 0.0) -> tuple[float, ...]:
    """Probabilities proportional to ``shares``, none above 1 nor below the floor, that sum to ``num_sampled``.

    A block whose probability would exceed 1 is always drawn, and the others share what is left.

    Args:
        shares: Not negative, as :func:`weights` returns them.
        num_sampled: Blocks in a draw, at most as many as there are shares.
        floor: The least probability, as a fraction of the uniform one, ``num_sampled / len(shares)``: from 0 (none) to
            1 (uniform).

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> inclusion_probabilities([0.7, 0.1, 0.1, 0.1], num_sampled=2)
        (1.0, 0.3333333333333333, 0.3333333333333333, 0.3333333333333333)
    """
    count = len(shares)
    if not 0 < num_sampled <= count or not 0 <= floor <= 1:
        raise ValueError(f"inclusion_probabilities: num_sampled={num_sampled} of {count}, floor={floor}")
    least = floor * num_sampled / count
    if not any(shares):
        shares = (1.0,) * count
    # The sum over blocks of clip(c * share, least, 1) grows with c, and is linear between the points at which a block meets a
    # bound. Find the stretch with num_sampled in it, and solve there.
    bounds = sorted(bound / share for share in shares if share > 0 for bound in (least, 1.0))
    low, high = 0, len(bounds) - 1
    while low < high:  # the first bound at which enough is given out
        middle = (low + high) // 2
        if math.fsum(_clipped(shares, bounds[middle], least)) < num_sampled:
            low = middle + 1
        else:
            high = middle
    factor = bounds[low]
    below = bounds[low - 1] if low else 0.0
    between = (below + factor) / 2
    inside = [share for share in shares if least < between * share < 1.0]
    fixed = math.fsum(_clipped([share for share in shares if not least < between * share < 1.0], between, least))
    if inside:
        factor = min(factor, max(below, (num_sampled - fixed) / math.fsum(inside)))
    found = _clipped(shares, factor, least)
    missing = num_sampled - math.fsum(found)
    if missing > 1e-9:  # every positive share is at 1 already: blocks without a share take the rest alike
        zeros = [i for i, share in enumerate(shares) if share == 0]
        for i in zeros:
            found[i] = min(1.0, found[i] + missing / len(zeros))
    return tuple(found)


def successive_inclusion_probabilities(shares: Sequence[float], num_sampled: int) -> tuple[float, ...]:
    """The probability with which each block is among ``num_sampled`` successive draws without replacement.

    A successive draw picks the ``num_sampled`` smallest of independent exponential times with rates ``shares``. So block i is
    in it if fewer than ``num_sampled`` others come before its time, and its probability is the integral over that time of the
    distribution of a sum of independent events.

    Args:
        shares: Not negative. Blocks without a share come last, in random order.
        num_sampled: Blocks in a draw, at most as many as there are shares.
    """
    positive = [i for i, share in enumerate(shares) if share > 0]
    found = [0.0] * len(shares)
    if len(positive) <= num_sampled:
        rest = len(shares) - len(positive)
        left = (num_sampled - len(positive)) / rest if rest else 0.0
        return tuple(1.0 if share > 0 else left for share in shares)
    total = math.fsum(shares)
    rates = [shares[i] / total for i in positive]
    times, masses = _quadrature(rates)
    for time, mass in zip(times, masses, strict=True):
        earlier = _fewer_than(num_sampled, [-math.expm1(-rate * time) for rate in rates])
        for block, rate, chance in zip(positive, rates, earlier, strict=True):
            found[block] += mass * rate * math.exp(-rate * time) * chance
    scale = num_sampled / math.fsum(found)
    return tuple(min(1.0, probability * scale) for probability in found)


def _clipped(shares: Sequence[float], factor: float, least: float) -> list[float]:
    return [min(1.0, max(least, factor * share)) for share in shares]


def _quadrature(rates: Sequence[float]) -> tuple[list[float], list[float]]:
    """Times and their weights for integrals over (0, inf) that decay with some of ``rates``: a trapezoid in log time.

    With ``t = exp(s)`` the integrand falls off on both sides faster than any power, where equal steps converge fast.
    """
    low, high = math.log(1e-12 / max(rates)), math.log(60.0 / min(rates))
    count = math.ceil(_NODES * (high - low))
    step = (high - low) / count
    times = [math.exp(low + step * node) for node in range(count + 1)]
    return times, [step * time for time in times]


def _fewer_than(count: int, chances: Sequence[float]) -> list[float]:
    """For each of several independent events, the probability that fewer than ``count`` of the others happen."""
    before, after = _counts(count, chances), _counts(count, chances[::-1])[::-1]
    result = []
    for first, second in zip(before[:-1], after[1:], strict=True):
        at_most = list(accumulate(second))
        result.append(math.fsum(first[number] * at_most[count - 1 - number] for number in range(count)))
    return result


def _counts(count: int, chances: Sequence[float]) -> list[list[float]]:
    """For the first 0, 1, 2, ... events: the probabilities that 0, 1, ..., ``count - 1`` of them happen."""
    exactly = [1.0] + [0.0] * (count - 1)
    result = [exactly]
    for chance in chances:
        shifted = [0.0, *exactly[:-1]]
        exactly = [one + chance * (other - one) for one, other in zip(exactly, shifted, strict=True)]
        result.append(exactly)
    return result
