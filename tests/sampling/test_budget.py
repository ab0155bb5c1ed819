"""Draws of units of unequal size: within the budget whatever is drawn, and each with the probability that is told."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_ds.sampling.budget import Deck, counts, groups

SMALL = ([576 * 576, 576 * 192, 576 * 192, 576 * 576] + [576 * 1536] * 3) * 30
SEVEN = ([4096 * 4096] * 4 + [4096 * 11008] * 3) * 32
ODD = [7, 31, 2, 2, 19, 40, 11, 5, 5, 23, 1, 17]
sizes_and_budget = st.lists(st.integers(1, 200), min_size=1, max_size=40).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.integers(max(sizes), 2 * sum(sizes)))
)


@settings(deadline=None, max_examples=200)
@given(sizes_and_budget, st.integers(0, 5))
def test_draws_of_a_deck_are_full_and_each_unit_has_its_turn(case: tuple[list[int], int], seed: int) -> None:
    sizes, budget = case
    deck, seen = Deck(sizes, budget, str(seed)), Counter[int]()
    for index in range(40):
        drawn = deck.draw(index)
        assert list(drawn) == sorted(set(drawn))
        room = budget - sum(sizes[unit] for unit in drawn)
        assert room >= 0
        seen.update(drawn)
        counts_ = [seen[unit] for unit in range(len(sizes))]
        assert max(counts_) - min(counts_) <= 2
        behind = [unit for unit in range(len(sizes)) if unit not in drawn and seen[unit] < max(counts_)]
        assert all(sizes[unit] > room for unit in behind)


@pytest.mark.parametrize(
    ("sizes", "budget"),
    [(SMALL, 2 * sum(SMALL) // 30), (SEVEN, sum(SEVEN) // 5), (ODD, 40), (ODD, 150), ([4, 4, 2, 2, 2, 2], 8)],
)
def test_packs_are_dealt_one_after_the_other_in_another_order(sizes: list[int], budget: int) -> None:
    deck, dealt, packs = Deck(sizes, budget, "a"), Counter[int](), 30
    draws = []
    while len(draws) < 10_000 and min(dealt[unit] for unit in range(len(sizes))) < packs:
        draws.append(deck.draw(len(draws)))
        dealt.update(draws[-1])
    filled = sum(sizes[unit] for drawn in draws for unit in drawn) / budget / len(draws)
    assert filled > (0.93 if sizes is ODD else 1 - min(sizes) / budget)
    assert packs * sum(sizes) <= sum(sizes[unit] for drawn in draws for unit in drawn) <= (packs + 2) * sum(sizes)
    assert len({drawn for drawn in draws if len(drawn) < len(sizes)}) > 3
    assert [deck.draw(i) for i in range(8)] == draws[:8]  # from the start again
    assert Deck(sizes, budget, "a").draw(11) == draws[11]
    assert [Deck(sizes, budget, "b").draw(i) for i in range(8)] != draws[:8]


@settings(deadline=None, max_examples=300)
@given(sizes_and_budget, st.randoms(use_true_random=False))
def test_counts_fit_into_the_budget_and_leave_no_room(case: tuple[list[int], int], chance: random.Random) -> None:
    sizes, budget = case
    shares = [chance.choice([0.0, 0.1, 1.0, 3.0]) for _ in sizes]
    known, found = groups(sizes), counts(sizes, shares, budget)
    assert sorted(unit for group in known for unit in group) == list(range(len(sizes)))
    assert all(max(sizes[u] for u in group) <= 1.25 * min(sizes[u] for u in group) for group in known)
    assert all(0 <= count <= len(group) for count, group in zip(found, known, strict=True))
    costs = [max(sizes[u] for u in group) for group in known]
    left = budget - sum(cost * count for cost, count in zip(costs, found, strict=True))
    assert left >= 0
    assert all(cost > left for cost, count, group in zip(costs, found, known, strict=True) if count < len(group))


def test_counts_follow_shares() -> None:
    known = groups(SMALL)
    assert counts(SMALL, [1.0] * len(SMALL), sum(SMALL) // 15) == [6, 4, 4]
    one_kind = [1.0 if size == 576 * 576 else 0.0 for size in SMALL]
    assert counts(SMALL, one_kind, sum(SMALL) // 15)[1] == 21  # all the budget holds of them, and no room for more
    skewed = [2.0 if size == 576 * 1536 else 1.0 for size in SMALL]
    assert counts(SMALL, skewed, sum(SMALL) // 5) == [20, 8, 8]
    assert [len(group) for group in known] == [90, 60, 60]


@pytest.mark.parametrize(
    "call", [lambda: Deck([3, 9], 8, ""), lambda: Deck([], 8, ""), lambda: counts([9, 9], [1, 1], 8)]
)
def test_what_does_not_fit_is_an_error(call: Any) -> None:
    with pytest.raises(ValueError, match="budget=8 for units of "):
        call()
