"""``MatrixDraws``: which matrices train in an interval, within a budget of elements."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lisa_ds.config import LisaConfig
from lisa_ds.config.sampler_kinds import ByScores, Cyclic
from lisa_ds.sampling import probabilities
from lisa_ds.sampling.budget import Deck, counts, groups
from lisa_ds.sampling.schedule import draw, draw_by_probability


@dataclass(frozen=True)
class Matrices:
    """What is drawn of a model in place of its blocks: each matrix by its index, and what trains beside them."""

    sizes: tuple[int, ...]
    """Elements of each."""

    blocks: tuple[int, ...]
    """The block that each is in."""

    follows: tuple[bool, ...]
    """Whether it is not drawn, but trains whenever something else of its block does."""

    num_blocks: int


class MatrixDraws:
    """Draws of units that fill a share of the model, and never exceed it.

    ``cyclic`` draws every matrix once a cycle, however large. All others draw a number of each size, so that matrices of one size are
    equally likely, or by their scores.

    Args:
        config: The ``lisa`` section.
        matrices: Those of the model.
        frozen: Indices of those that never train.

    Raises:
        ConfigError: The budget is below the largest matrix.
    """

    def __init__(self, config: LisaConfig, matrices: Matrices, frozen: Collection[int] = ()) -> None:
        self._config, self._matrices = config, matrices
        free = [unit for unit in range(len(matrices.sizes)) if unit not in frozen]
        self.drawable = tuple(unit for unit in free if not matrices.follows[unit])
        """Indices of those that can be drawn, ascending."""
        self._following = tuple(unit for unit in free if matrices.follows[unit])
        self._sizes = sizes = tuple(matrices.sizes[unit] for unit in self.drawable)
        self._beside = sum(matrices.sizes[unit] for unit in self._following)
        self._groups = groups(sizes)
        self._decks: dict[int, Deck] = {}  # by budget
        # The last of each, as the same is asked for several times in an interval, and mostly in the next.
        self._numbers = functools.lru_cache(maxsize=1)(self._count)
        self.at = functools.lru_cache(maxsize=1)(self._at)
        """The matrices of an interval; see :meth:`_at`."""
        # What trains beside them has its place first.
        most = self.budget(config.num_sampled(matrices.num_blocks)) + self._beside
        config.check_budget(most, max(sizes) + self._beside, sum(sizes) + self._beside)

    def budget(self, layers: int) -> int:
        """Elements of matrices that a draw may have, where so many blocks' worth is drawn; the config's share where it is one.

        What trains beside them is taken off: as much of it as there is, whichever blocks are drawn from.
        """
        share = Fraction(layers, self._matrices.num_blocks)
        if self._config.sampling_ratio is not None:
            share = self._config.share(self._matrices.num_blocks)
        return int(share * (sum(self._sizes) + self._beside)) - self._beside

    def _at(self, interval: int, layers: int, shares: tuple[float, ...] | None) -> tuple[int, ...]:
        """The matrices of ``interval`` and what trains beside them, ascending.

        Args:
            interval: Its index, from 0.
            layers: How many blocks' worth it draws.
            shares: Of each that can be drawn, for a sampler by scores.
        """
        drawn = {self.drawable[place] for place in self._places(interval, self.budget(layers), shares)}
        blocks = {self._matrices.blocks[unit] for unit in drawn}
        return tuple(sorted(drawn.union(unit for unit in self._following if self._matrices.blocks[unit] in blocks)))

    def _places(self, interval: int, budget: int, shares: tuple[float, ...] | None) -> Sequence[int]:
        if self._config.sampler.name == Cyclic.name:
            if budget not in self._decks:
                self._decks[budget] = Deck(self._sizes, budget, f"cyclic matrices/{self._config.seed}")
            return self._decks[budget].draw(interval)
        numbers = self._numbers(budget, shares)
        drawn = []
        for place, (group, number) in enumerate(zip(self._groups, numbers, strict=True)):
            if number:
                drawn += [group[i] for i in self._within(group, number, place, interval, shares)]
        return drawn

    def _count(self, budget: int, shares: tuple[float, ...] | None) -> list[int]:
        """The number of units that a draw has of each group."""
        return counts(self._sizes, shares or (1.0,) * len(self._sizes), budget)

    def chances(self, layers: int, shares: tuple[float, ...] | None) -> tuple[float, ...]:
        """The probability of each matrix to be in a draw; of ``cyclic``, if nothing is known of other draws, and all were full.

        Of what trains beside them it is that of any matrix of its block, were each drawn on its own.
        """
        found = [0.0] * len(self._matrices.sizes)
        for unit, chance in zip(self.drawable, self._chances(self.budget(layers), shares), strict=True):
            found[unit] = chance
        for follower in self._following:
            block = self._matrices.blocks[follower]
            own = [found[unit] for unit in self.drawable if self._matrices.blocks[unit] == block]
            found[follower] = 1 - math.prod(1 - chance for chance in own)
        return tuple(found)

    def _chances(self, budget: int, shares: tuple[float, ...] | None) -> Sequence[float]:
        if self._config.sampler.name == Cyclic.name:
            return (min(1.0, budget / sum(self._sizes)),) * len(self._sizes)
        found = [0.0] * len(self._sizes)
        numbers = self._numbers(budget, shares)
        for group, number in zip(self._groups, numbers, strict=True):
            if number:
                for unit, chance in zip(group, self._chances_within(group, number, shares), strict=True):
                    found[unit] = chance
        return found

    def _within(
        self, group: Sequence[int], number: int, place: int, interval: int, shares: tuple[float, ...] | None
    ) -> tuple[int, ...]:
        seed: int | str = f"{self._config.seed}/{place}"  # groups are drawn independently
        kind = self._config.sampler.kind
        if shares is None or not isinstance(kind, ByScores):
            name = self._config.sampler.name
            return draw(name, seed=seed, interval=interval, num_layers=len(group), num_sampled=number)
        own = probabilities.weights([shares[unit] for unit in group])
        return draw_by_probability(
            kind.draw,
            seed=seed,
            interval=interval,
            probabilities=() if kind.by_shares else self._chances_within(group, number, shares),
            shares=own,
            num_sampled=number,
        )

    def _chances_within(self, group: Sequence[int], number: int, shares: tuple[float, ...] | None) -> tuple[float, ...]:
        kind = self._config.sampler.kind
        if shares is None or not isinstance(kind, ByScores):
            return (number / len(group),) * len(group)
        own = probabilities.weights([shares[unit] for unit in group])
        if kind.by_shares:
            return probabilities.successive_inclusion_probabilities(own, number)
        return probabilities.inclusion_probabilities(own, number, kind.floor)
