"""Draws of units of unequal size that never exceed a budget of elements: matrices, of which a block has several sizes.

A :class:`Deck` deals every unit once a cycle, and fills each draw. Where each draw is made on its own, units of about one size form
a *group*: each group has a number of units in every draw, and a draw by probability is made within it.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

from lisa_ds.sampling.schedule import shuffled

_SPREAD = Fraction(5, 4)  # from the smallest unit of a group to its largest
_KEPT = 4  # draws that can be asked for again without dealing all of them anew


class Deck:
    """Units dealt like cards, from a pack that is shuffled anew when it is used up.

    A draw takes cards in order; one that does not fit any more is passed over, and is among the first of the next draw. Where nothing
    of a pack fits the next one is begun, so that a draw has no room for anything left of the two. So each unit is dealt once in each
    pack, and at no time has one been dealt more than twice oftener than another.

    Draws follow from those before: the first one that is asked for after a resume costs 10 to 50 microseconds for each of them,
    with 210 to 560 units.

    Args:
        sizes: Elements of each unit.
        budget: Elements of a draw at most, no fewer than those of the largest unit.
        seed: Of the shuffles.

    Raises:
        ValueError: A unit alone exceeds the budget, or there are none.

    Example:
        >>> deck = Deck([4, 4, 2, 2, 2, 2], budget=8, seed="0")
        >>> sorted(deck.draw(0) + deck.draw(1))
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, sizes: Sequence[int], budget: int, seed: str) -> None:
        if not sizes or max(sizes) > budget:
            raise ValueError(f"Deck: budget={budget} for units of {max(sizes, default=0)} elements at most")
        self._sizes, self._budget, self._seed = tuple(sizes), budget, seed
        self._smallest = min(sizes)
        self._begin()

    def _begin(self) -> None:
        self._packs = 0
        self._open: list[list[int]] = []  # what is left of the pack that is dealt, and of the next if it is begun
        self._dealt = 0
        self._last: deque[tuple[int, ...]] = deque(maxlen=_KEPT)

    def draw(self, index: int) -> tuple[int, ...]:
        """The units of draw ``index`` (from 0), ascending."""
        if index < self._dealt - len(self._last):
            self._begin()
        while self._dealt <= index:
            self._last.append(self._next())
            self._dealt += 1
        return self._last[index - self._dealt]

    def _next(self) -> tuple[int, ...]:
        taken: set[int] = set()
        room = self._budget
        self._open = [pack for pack in self._open if pack]
        for place in range(2):
            if room < self._smallest:
                break
            if place == len(self._open):
                stream = random.Random(f"{self._seed}/{self._packs}")
                self._open.append(shuffled(stream, range(len(self._sizes)), len(self._sizes)))
                self._packs += 1
            left = []
            for unit in self._open[place]:
                if self._sizes[unit] <= room and unit not in taken:
                    taken.add(unit)
                    room -= self._sizes[unit]
                else:
                    left.append(unit)
            self._open[place] = left
        return tuple(sorted(taken))


def groups(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Units of about one size together, the largest first: none has more than 5/4 of the elements of another in its group."""
    found: list[list[int]] = []
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        if found and sizes[found[-1][0]] <= _SPREAD * sizes[unit]:
            found[-1].append(unit)
        else:
            found.append([unit])
    return [tuple(sorted(group)) for group in found]


def counts(sizes: Sequence[int], shares: Sequence[float], budget: int) -> list[int]:
    """How many units of each group of :func:`groups` a draw has: in proportion to its share, and as many as the budget holds.

    Args:
        sizes: Elements of each unit.
        shares: Of each unit, not negative: twice the share, drawn twice as often.
        budget: Elements of a draw at most, whichever units of each group are drawn.

    Raises:
        ValueError: No unit fits into the budget.

    Example:
        >>> counts([4, 4, 4, 4, 2, 2, 2, 2], [1.0] * 8, budget=12)
        [2, 2]
    """
    known = groups(sizes)
    costs = [max(sizes[unit] for unit in group) for group in known]
    if min(costs) > budget:
        raise ValueError(f"counts: budget={budget} for units of {min(costs)} elements at least")
    wanted = [math.fsum(shares[unit] for unit in group) for group in known]
    if not any(wanted):
        wanted = [float(len(group)) for group in known]
    found, left = [0] * len(known), budget
    while True:
        # One unit more for the group that is furthest behind its share, as seats are given out by Sainte-Lague.
        fits = [i for i, group in enumerate(known) if found[i] < len(group) and costs[i] <= left]
        if not fits:
            return found
        best = max(fits, key=lambda i: (wanted[i] / (2 * found[i] + 1), len(known[i]) / (2 * found[i] + 1), -i))
        found[best] += 1
        left -= costs[best]
