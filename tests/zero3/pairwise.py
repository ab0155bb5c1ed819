"""Few cases in which every two values of different options meet: most mistakes of a combination are those of a pair."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Pair = frozenset[tuple[str, int]]


def pairs_of(chosen: Mapping[str, int]) -> set[Pair]:
    """Every two options of a case, with the indices of their values."""
    return {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}


def every_pair(options: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Every two values of different options."""
    return {
        frozenset({(first, i), (second, j)})
        for first, second in itertools.combinations(options, 2)
        for i in range(len(options[first]))
        for j in range(len(options[second]))
    }


def covering(options: Mapping[str, Sequence[Any]]) -> list[dict[str, int]]:
    """Cases, as an index into each option's values, that cover every pair; greedily, so always the same."""
    missing, cases = every_pair(options), []
    while missing:
        case = dict(sorted(min(missing, key=lambda pair: sorted(pair))))
        for option in sorted(options, key=lambda name: -len(options[name])):
            if option not in case:
                gains = [len(pairs_of({**case, option: i}) & missing) for i in range(len(options[option]))]
                case[option] = gains.index(max(gains))
        missing -= pairs_of(case)
        cases.append(case)
    return cases
