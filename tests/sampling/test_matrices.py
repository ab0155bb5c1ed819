"""Draws of matrices by a sampler: the budget, the schedules, and the probabilities that it tells."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError
from lisa_ds.sampling import LayerSampler
from lisa_ds.sampling.matrices import Matrices

BLOCK = (36, 12, 12, 36, 92, 92, 92)
SMALL = 3  # of a block, beside its matrices
BLOCKS = 6


def model(*, following: bool = False, sizes: tuple[int, ...] = BLOCK) -> Matrices:
    own = [(size, block, False) for block in range(BLOCKS) for size in sizes]
    own += [(SMALL, block, True) for block in range(BLOCKS) if following]
    made, blocks, follows = zip(*own, strict=True)
    return Matrices(made, blocks, follows, num_blocks=BLOCKS)


def sampler(matrices: Matrices, frozen: tuple[int, ...] = (), **config: Any) -> LayerSampler:
    read = LisaConfig.load({"interval_steps": 1, "unit": "matrix", **config})
    return LayerSampler(BLOCKS, read, frozen=frozen, matrices=matrices)


def elements(matrices: Matrices, drawn: tuple[int, ...]) -> int:
    return sum(matrices.sizes[unit] for unit in drawn)


@pytest.mark.parametrize("following", [False, True])
@pytest.mark.parametrize("name", ["uniform", "cyclic", "fixed", "by scores"])
@pytest.mark.parametrize(
    ("asked", "share"),
    [({"num_sampled_layers": 2}, 2 / 6), ({"sampling_ratio": 0.25}, 0.25), ({"sampling_ratio": 0.5}, 0.5)],
)
def test_no_draw_exceeds_the_budget(name: str, following: bool, asked: dict[str, Any], share: float) -> None:
    matrices = model(following=following)
    by_scores = name == "by scores"
    made = sampler(matrices, **asked, sampler={"name": "grad_norm", "score": "ema"} if by_scores else name)
    if by_scores:
        made.set_scores([1.0 + i % 5 for i in range(len(matrices.sizes))], 0)
    budget = share * sum(matrices.sizes)
    loads = [elements(matrices, made.layers_at(interval)) for interval in range(200)]
    assert max(loads) <= budget
    # Filled, but for less than the smallest matrix, and for what blocks that are not drawn from have beside theirs.
    assert min(loads) > budget - min(BLOCK) - following * SMALL * BLOCKS


@pytest.mark.parametrize("asked", [{"num_sampled_layers": 2}, {"sampling_ratio": 0.21}])
def test_a_cycle_has_every_matrix_once(asked: dict[str, Any]) -> None:
    made, seen = sampler(model(), sampler="cyclic", **asked), Counter[int]()
    for interval in range(60):
        seen.update(made.layers_at(interval))
        assert max(seen.values()) - min(seen[unit] for unit in made.drawable) <= 2
    assert made.layers_at(7) == sampler(model(), sampler="cyclic", **asked).layers_at(
        7
    )  # whatever was asked for before


SCORES = tuple(1.0 + 3 * (unit % 4) + unit / 10 for unit in range(len(BLOCK) * BLOCKS))


@pytest.mark.parametrize("frozen", [(), (0, 4, 5, 11)])
@pytest.mark.parametrize(
    "chosen",
    [
        {"name": "uniform"},
        {"name": "cyclic"},
        {"name": "grad_norm", "score": "ema"},
        {"name": "grad_norm", "score": "ema", "draw": "successive"},
        {"name": "grad_norm", "score": "ema", "temperature": 0.5},
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_each_is_drawn_with_the_probability_that_is_told(chosen: dict[str, Any], frozen: tuple[int, ...]) -> None:
    made = sampler(model(), frozen, sampler=chosen, sampling_ratio=0.3)
    if chosen["name"] == "grad_norm":
        made.set_scores(SCORES, 0)
    told, draws = made.probabilities_at(0), 4000
    seen = Counter(unit for interval in range(draws) for unit in made.layers_at(interval))
    for unit, chance in enumerate(told):
        if chosen["name"] == "cyclic":  # told as if all draws were full
            assert seen[unit] == pytest.approx(draws * chance, rel=0.03)
            continue
        assert abs(seen[unit] - draws * chance) <= 4.5 * (draws * chance * (1 - chance)) ** 0.5 + 1e-9, unit
    assert all(told[unit] == 0 for unit in frozen)
    if chosen["name"] == "grad_norm":
        large = [unit for unit in made.drawable if model().sizes[unit] == 92]  # of one size
        best, worst = max(large, key=SCORES.__getitem__), min(large, key=SCORES.__getitem__)
        assert told[best] > 1.2 * told[worst]


def test_what_is_small_trains_when_its_block_does() -> None:
    matrices = model(following=True)
    made = sampler(matrices, num_sampled_layers=1)
    for interval in range(50):
        drawn = made.layers_at(interval)
        own = {matrices.blocks[unit] for unit in drawn if not matrices.follows[unit]}
        assert {matrices.blocks[unit] for unit in drawn if matrices.follows[unit]} == own
    assert set(made.drawable) == set(range(len(BLOCK) * BLOCKS))


def test_growth_is_in_layers() -> None:
    matrices = model()
    made = sampler(matrices, num_sampled_layers=1, growth={"schedule": {3: 4}})
    loads = [elements(matrices, made.layers_at(interval)) for interval in range(6)]
    one = sum(BLOCK)
    assert all(0.9 * one <= load <= one for load in loads[:3])
    assert all(3.9 * one <= load <= 4 * one for load in loads[3:])


def test_a_budget_below_the_largest_matrix_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        sampler(model(), sampling_ratio=0.03)
    assert str(caught.value) == (
        "lisa_config: sampling_ratio: a draw of matrices has 66 elements at most, fewer than the largest matrix with 92; set "
        "sampling_ratio to 0.0412 or more"
    )


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"sampler": "bernoulli"}, "unit 'matrix' draws within a budget, which 'bernoulli' would exceed; use 'uniform' or 'cyclic'"),
        ({"sampler": {"name": "fixed", "layers": [1]}}, "unit 'matrix' does not go with sampler.layers, which names whole layers; remove one"),
        ({"sampler": "fisher"}, "unit 'matrix': sampler 'fisher' measures whole layers; use another, or unit 'block'"),
        ({"sampling_ratio": 0.5, "growth": {"schedule": {1: 3}}}, "growth counts in layers: with unit 'matrix' give num_sampled_layers in place of sampling_ratio"),
        ({"block_rest": "with_block", "block_rest_lr_scale": 2.0}, "block_rest_lr_scale has no effect with block_rest: with_block; remove one of them"),
        ({"block_rest": "never", "block_rest_lr_scale": 2.0}, "block_rest_lr_scale has no effect with block_rest: never; remove one of them"),
        ({"unit": "block", "block_rest": "never"}, "block_rest is of unit 'matrix'; with unit 'block' layers are drawn whole: remove one"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_unit_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LisaConfig.load({"unit": "matrix", **config})
    assert str(caught.value) == f"lisa_config: {told}"
