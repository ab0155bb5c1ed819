"""What may be said of runs that were compared: a choice among what was tried, paired differences with intervals.

Choices are made on one part of the held-out rows, ``select``, and verdicts are read on the other, ``verdict``: the lowest of several
losses is lower than it would be on other rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SELECT, VERDICT = PARTS = ("select", "verdict")
"""The two parts of the held-out rows."""


@dataclass(frozen=True)
class Choice:
    """A learning rate that was chosen."""

    rate: float
    at_edge: bool
    """Whether it is the lowest or the highest of several that were tried: a better one may lie beyond."""


def choose(tried: Mapping[float, float]) -> Choice | None:
    """The learning rate with the lowest loss, the lower one of equals; None where no loss is a number.

    Args:
        tried: Loss by learning rate.

    Example:
        >>> choose({1e-4: 2.0, 3e-4: 1.5, 1e-3: 1.8})
        Choice(rate=0.0003, at_edge=False)
    """
    measured = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    if not measured:
        return None
    rate = min(measured, key=lambda rate: (measured[rate], rate))
    return Choice(rate, len(tried) > 1 and rate in (min(tried), max(tried)))


@dataclass(frozen=True)
class Gap:
    """Paired differences and what they come to."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return statistics.fmean(self.values)

    def half_width(self, level: float = 0.95) -> float:
        """Half of the t confidence interval; infinite for a single pair."""
        n = len(self.values)
        if n < 2:
            return math.inf
        return t_quantile((1 + level) / 2, n - 1) * statistics.stdev(self.values) / math.sqrt(n)

    def __str__(self) -> str:
        """Mean and 95 % interval."""
        half = self.half_width()
        if math.isinf(half):
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.mean - half:+.4f}, {self.mean + half:+.4f}]"


def pairs(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Gap | None:
    """Differences at the seeds that both have, in the order of seeds; None without one.

    Args:
        ours: Loss by seed.
        theirs: The same of what it is compared with.
    """
    common = sorted(ours.keys() & theirs.keys())
    return Gap(tuple(ours[seed] - theirs[seed] for seed in common)) if common else None


@dataclass(frozen=True)
class Holding:
    """Which of several differences are told from zero: each by itself, and all at once."""

    alone: list[int]
    """Numbers of those whose 95 % interval is without zero."""

    together: list[int]
    """The same at :attr:`level`, so that all hold together at 95 % (Bonferroni)."""

    level: float


def holding(gaps: Sequence[Gap]) -> Holding:
    """See :class:`Holding`. Of 20 intervals at 95 % one misses zero by chance alone."""
    level = 1 - 0.05 / max(1, len(gaps))

    def clear(level: float) -> list[int]:
        return [i for i, gap in enumerate(gaps) if abs(gap.mean) > gap.half_width(level)]

    return Holding(clear(0.95), clear(level), level)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, above the median.

    Example:
        >>> round(t_quantile(0.975, 4), 3)
        2.776
    """
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    # By x = sqrt(degrees) * tan(angle) the density becomes a power of the cosine, over a finite range.
    return math.sqrt(degrees) * math.tan(
        _bisect(
            lambda angle: (
                0.5 + scale * math.sqrt(degrees) * _simpson(lambda a: math.cos(a) ** (degrees - 1), 0.0, angle)
            ),
            probability,
            0.0,
            math.pi / 2,
        )
    )


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2


def _simpson(function: Callable[[float], float], low: float, high: float, pieces: int = 200) -> float:
    width = (high - low) / pieces
    inner = sum((4 if i % 2 else 2) * function(low + i * width) for i in range(1, pieces))
    return width / 3 * (function(low) + inner + function(high))
