"""How long runs take, as far as is known: time left, and whether one more would end in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping


class Pace:
    """Seconds of the runs that have ended, by kind.

    Args:
        deadline_s: Seconds from now after which nothing should run; None for no end.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        self._deadline_s = deadline_s
        self._start = time.monotonic()
        self._took: dict[str, list[float]] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._start

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return self._deadline_s is not None and self.elapsed >= self._deadline_s

    def took(self, kind: str, seconds: float, amount: float = 1.0) -> None:
        """Note a run of a kind; ``amount``, such as its steps, says how much was done in that time."""
        self._took.setdefault(kind, []).append(seconds / amount)

    def expected(self, kind: str, amount: float = 1.0, *, cautious: bool = False) -> float | None:
        """Seconds of the next run, by the median of its kind, or of all where none of its kind has ended; None before the first.

        Args:
            kind: Of the run.
            amount: How much it does.
            cautious: The highest decile instead.
        """
        known = self._took.get(kind) or [each for kind in self._took.values() for each in kind]
        if not known:
            return None
        if cautious and len(known) > 1:
            return amount * statistics.quantiles(known, n=10)[-1]
        return amount * statistics.median(known)

    def in_time(self, kind: str, amount: float = 1.0) -> bool:
        """Whether a run that begins now would end before the deadline; True where nothing is known of its time."""
        if self._deadline_s is None:
            return True
        return self.elapsed + (self.expected(kind, amount, cautious=True) or 0.0) < self._deadline_s

    def left(self, runs: Mapping[str, int], workers: int) -> float | None:
        """Seconds until so many more runs of each kind have ended, ``workers`` at a time; None before the first has."""
        seconds = [self.expected(kind) for kind in runs]
        if not seconds or None in seconds:
            return None
        total = sum(count * each for count, each in zip(runs.values(), seconds, strict=True) if each is not None)
        return total / workers
