"""Paired differences, with intervals by Student's t distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass


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
