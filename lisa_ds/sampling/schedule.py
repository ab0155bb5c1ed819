"""Which blocks train in which interval: a pure function of the seed and the interval's index.

Ranks therefore agree without communication, a resumed run needs only its step, and the next draw is known in advance.
Only ``random()`` of :mod:`random` is used: for no other method does Python promise the same numbers from a seed.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from lisa_ds.config.sampler_kinds import Bernoulli, Cyclic, Fixed, Uniform

Item = TypeVar("Item")

_BITS = 40  # of a probability in a systematic draw


def draw(
    sampler: str,
    *,
    seed: int | str,
    interval: int,
    num_layers: int,
    num_sampled: int,
    layers: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Return the blocks that train in one interval, ascending.

    Args:
        sampler: ``uniform``, ``cyclic``, ``bernoulli`` or ``fixed``.
        seed: Any integer or text; equal on every rank.
        interval: Index of the interval, from 0.
        num_layers: Number of blocks to choose from.
        num_sampled: Blocks in a draw; for ``bernoulli`` their expected number. At most ``num_layers``.
        layers: The blocks that ``fixed`` returns; without them ``fixed`` keeps one uniform draw for the whole run.

    Raises:
        ValueError: The sampler does not exist, or a number is out of range.

    Example:
        >>> draw("uniform", seed=0, interval=0, num_layers=32, num_sampled=2)
        (14, 20)
    """
    if interval < 0 or not 0 < num_sampled <= num_layers:
        raise ValueError(f"draw: interval={interval}, num_sampled={num_sampled} of num_layers={num_layers}")
    if sampler not in _DRAWS:
        raise ValueError(f"draw: no sampler named {sampler!r}")
    if sampler == Fixed.name and layers is not None:
        return tuple(sorted(layers))
    return _DRAWS[sampler](seed, interval, num_layers, num_sampled)


def draw_by_probability(
    method: str,
    *,
    seed: int | str,
    interval: int,
    probabilities: Sequence[float],
    shares: Sequence[float],
    num_sampled: int,
) -> tuple[int, ...]:
    """Return the blocks of one interval where some are to be drawn more often than others, ascending.

    Args:
        method: ``systematic``: each block with exactly its inclusion probability, always ``num_sampled`` of them.
            ``successive``: one block after the other, each with its share of those that are left. ``bernoulli``: each on its
            own with its inclusion probability, so that their number varies.
        seed: Any integer or text; equal on every rank.
        interval: Index of the interval, from 0.
        probabilities: Inclusion probabilities, for ``systematic`` and ``bernoulli``: in [0, 1], summing to ``num_sampled``.
        shares: For ``successive``: not negative.
        num_sampled: Blocks in a draw.

    Raises:
        ValueError: The method does not exist.
    """
    stream = random.Random(f"{method}/{seed}/{interval}")
    if method == "systematic":
        return _systematic(stream, probabilities, num_sampled)
    if method == "successive":
        return _successive(stream, shares, num_sampled)
    if method == "bernoulli":
        return tuple(layer for layer, chance in enumerate(probabilities) if stream.random() < chance)
    raise ValueError(f"draw_by_probability: no method named {method!r}")


def _systematic(stream: random.Random, probabilities: Sequence[float], num_sampled: int) -> tuple[int, ...]:
    """Lay the blocks end to end in random order, each as long as its probability; take those at marks one apart.

    Lengths are multiples of 2^-40, so that they add up exactly and no block is longer than the distance of the marks:
    each block is taken at most once, and one block for each mark.
    """
    one = 1 << _BITS
    lengths = [min(one, round(chance * one)) for chance in probabilities]
    spare = num_sampled * one - sum(lengths)  # what rounding has left over or taken too much
    for layer in sorted(range(len(lengths)), key=lambda layer: -lengths[layer]):
        change = max(-lengths[layer], min(one - lengths[layer], spare))
        if 0 < lengths[layer] < one:
            lengths[layer] += change
            spare -= change
    order = shuffled(stream, range(len(lengths)), len(lengths))
    mark = int(stream.random() * one)
    taken, end = [], 0
    for layer in order:
        end += lengths[layer]
        if mark < end:
            taken.append(layer)
            mark += one
    return tuple(sorted(taken))


def _successive(stream: random.Random, shares: Sequence[float], num_sampled: int) -> tuple[int, ...]:
    """Pick one block after the other in proportion to the shares of those left; once no share is left, at random."""
    left = list(range(len(shares)))
    taken: list[int] = []
    while len(taken) < num_sampled:
        ends = list(accumulate(shares[layer] for layer in left))
        place = bisect_right(ends, stream.random() * ends[-1]) if ends[-1] > 0 else int(stream.random() * len(left))
        taken.append(left.pop(min(place, len(left) - 1)))
    return tuple(sorted(taken))


def _sample(seed: str, num_layers: int, num_sampled: int) -> tuple[int, ...]:
    """Draw a set of fixed size; every set of that size is equally likely."""
    return tuple(sorted(shuffled(random.Random(seed), range(num_layers), num_sampled)))


def _uniform(seed: int | str, interval: int, num_layers: int, num_sampled: int) -> tuple[int, ...]:
    return _sample(f"uniform/{seed}/{interval}", num_layers, num_sampled)


def _fixed(seed: int | str, interval: int, num_layers: int, num_sampled: int) -> tuple[int, ...]:
    return _sample(f"fixed/{seed}", num_layers, num_sampled)


def _bernoulli(seed: int | str, interval: int, num_layers: int, num_sampled: int) -> tuple[int, ...]:
    """Draw every block on its own with probability ``num_sampled / num_layers``; the set may be empty.

    This is Algorithm 1 of the LISA paper to the letter: the *expected* size of the set is ``num_sampled``.
    """
    stream = random.Random(f"bernoulli/{seed}/{interval}")
    return tuple(layer for layer in range(num_layers) if stream.random() * num_layers < num_sampled)


def _cyclic(seed: int | str, interval: int, num_layers: int, num_sampled: int) -> tuple[int, ...]:
    """Deal the blocks like cards, and reshuffle when the pack is used up: a cycle deals every block exactly once.

    Where the pack runs out inside a draw, the draw is completed from the next one, which is shuffled such that
    the completed draw has no block twice. Cycles thus depend on the one before, but only until a pack and a draw end
    together: every ``lcm(num_layers, num_sampled)`` cards. From there the deal is replayed, so that its cost does
    not grow with ``interval``.
    """
    common = math.gcd(num_layers, num_sampled)
    round_, draw_in_round = divmod(interval, num_layers // common)
    stream = random.Random(f"cyclic/{seed}/{round_}")
    begin = draw_in_round * num_sampled
    end = begin + num_sampled
    dealt: list[int] = []  # the cards of the present round
    while len(dealt) < end:
        cut = len(dealt) // num_sampled * num_sampled
        begun = set(dealt[cut:])  # the draw that the last pack could not complete
        completion = shuffled(
            stream,
            [layer for layer in range(num_layers) if layer not in begun],
            num_sampled - len(begun) if begun else 0,
        )
        others = set(range(num_layers)).difference(completion)
        dealt += completion + shuffled(stream, sorted(others), len(others))
    return tuple(sorted(dealt[begin:end]))


def shuffled(stream: random.Random, items: Sequence[Item], count: int) -> list[Item]:
    """Return ``count`` different ``items`` in random order (Fisher-Yates)."""
    pool = list(items)
    for place in range(count):
        other = place + int(stream.random() * (len(pool) - place))
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:count]


_DRAWS: dict[str, Callable[[int | str, int, int, int], tuple[int, ...]]] = {
    Uniform.name: _uniform,
    Cyclic.name: _cyclic,
    Bernoulli.name: _bernoulli,
    Fixed.name: _fixed,
}
"""For samplers with equal probabilities: the function from seed, interval, number of blocks and number to draw."""
