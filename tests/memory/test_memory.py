"""Bytes of model state, against the formula written out by hand; the engine's tests hold it to live tensors."""

from __future__ import annotations

from math import ceil

import pytest

from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError
from lisa_ds.memory import KINDS, ModelShape, Precision, full_state_bytes, plan, state_bytes

# Odd sizes on purpose: only parameter by parameter does rounding up come out right.
NUMELS: dict[int | str, tuple[int, ...]] = {
    0: (11, 7),
    1: (13, 5),
    2: (17, 3),
    "embeddings": (101,),
    "lm_head": (103,),
    "rest": (9,),
}
SHAPE = ModelShape.from_numels(NUMELS)


def shards(world_size: int, *units: int | str) -> int:
    return sum(ceil(numel / world_size) for unit in units for numel in NUMELS[unit])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("sampled", [(), (1,), (0, 2)])
@pytest.mark.parametrize("never", [(), ("embeddings",), ("embeddings", "lm_head", "rest")])
def test_bytes_are_those_of_the_sampled_partitions(
    world_size: int, sampled: tuple[int, ...], never: tuple[str, ...]
) -> None:
    config = LisaConfig.load(dict.fromkeys(never, "never"))
    trained = shards(world_size, *sampled, *(role for role in ("embeddings", "lm_head", "rest") if role not in never))
    report = state_bytes(SHAPE, sampled=sampled, world_size=world_size, config=config)
    assert tuple(report) == KINDS
    assert report == dict.fromkeys(KINDS, 0) | {
        "weights": 2 * shards(world_size, *NUMELS),
        "gradients": 2 * trained,
        **dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), 4 * trained),
    }


def test_precision_offload_and_bucket_are_counted() -> None:
    precision = Precision(weight_bytes=4, gradient_bytes=4, bucket_bytes=1000, offload_optimizer=True)
    report = state_bytes(SHAPE, sampled=[2], world_size=2, precision=precision)
    trained = shards(2, 2, "embeddings", "lm_head", "rest")
    assert report["weights"] == 4 * shards(2, *NUMELS)
    assert (report["gradients"], report["master"], report["buckets"]) == (8 * trained, 4 * trained, 1000)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("master_bytes", "moments"), [(4, "fp32"), (4, "int8"), (0, "fp32"), (0, "bf16"), (0, "int8")])
def test_formats_of_the_state_are_counted_with_their_scales(world_size: int, master_bytes: int, moments: str) -> None:
    numels: dict[int | str, tuple[int, ...]] = {0: (1000, 7), 1: (513, 256), "embeddings": (5000,)}
    shape = ModelShape.from_numels(numels)
    precision = Precision(master_bytes=master_bytes, moments=moments)
    report = state_bytes(shape, sampled=[0], world_size=world_size, precision=precision)
    partitions = [ceil(numel / world_size) for numel in (1000, 7, 5000)]
    assert report["master"] == master_bytes * sum(partitions)
    each = {"fp32": 4, "bf16": 2, "int8": 1}[moments]
    scales = 4 * sum(ceil(partition / 256) for partition in partitions) if moments == "int8" else 0
    assert report["exp_avg"] == report["exp_avg_sq"] == each * sum(partitions) + scales
    planned = plan(shape, LisaConfig(num_sampled_layers=1), world_size=world_size, precision=precision)
    assert planned.most["exp_avg"] == report["exp_avg"]  # layer 0 is the larger one


def test_frozen_and_tied_weights_are_counted_once_as_weights() -> None:
    shape = ModelShape(layers=((8,),), embeddings=(100,), tied=True, frozen=(50,))
    report = full_state_bytes(shape, world_size=2)
    assert (report["weights"], report["exp_avg"]) == (2 * (4 + 50 + 25), 4 * (4 + 50))


@pytest.mark.parametrize(
    ("fields", "typical", "most"),
    [
        ({"num_sampled_layers": 1}, 18 + 18 + 20, 20),
        ({"num_sampled_layers": 3}, 3 * (18 + 18 + 20), 18 + 18 + 20),
        ({"num_sampled_layers": 1, "sampler": "bernoulli"}, 18 + 18 + 20, 18 + 18 + 20),
        ({"sampler": {"name": "fixed", "layers": [0]}}, 3 * 18, 18),
    ],
)
def test_a_plan_tells_the_typical_and_the_worst_draw(fields: dict[str, object], typical: int, most: int) -> None:
    planned = plan(SHAPE, LisaConfig.load(fields), world_size=1)
    always = shards(1, "embeddings", "lm_head", "rest")
    assert planned.typical["master"] == 4 * always + round(4 * typical / 3)
    assert planned.most["master"] == 4 * (always + most)
    assert planned.full == full_state_bytes(SHAPE, world_size=1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bytes_are_those_of_the_roles_that_are_in(world_size: int) -> None:
    config = LisaConfig.load({"embeddings": {"every": 4}, "lm_head": "sampled"})
    for roles in ((), ("rest",), ("lm_head", "rest")):
        report = state_bytes(SHAPE, sampled=[1], roles=roles, world_size=world_size)
        assert report["master"] == 4 * shards(world_size, 1, *roles)
    always = state_bytes(SHAPE, sampled=[1], config=config, world_size=world_size)
    assert always["master"] == 4 * shards(world_size, 1, "rest")


@pytest.mark.parametrize(
    ("fields", "typical", "most"),
    [
        ({"embeddings": {"every": 4}}, 103 + 101 / 4, 103 + 101),
        ({"embeddings": "sampled", "lm_head": {"every": 2}}, 101 * 2 / 3 + 103 / 2, 103 + 101),
        ({"embeddings": "never", "lm_head": "sampled"}, 103 * 2 / 3, 103),
    ],
)
def test_a_plan_counts_roles_by_their_share_of_the_intervals(
    fields: dict[str, object], typical: float, most: int
) -> None:
    planned = plan(SHAPE, LisaConfig.load({"num_sampled_layers": 2, **fields}), world_size=1)
    layers = 18 + 18 + 20
    assert planned.typical["master"] == pytest.approx(4 * (9 + typical + layers * 2 / 3), abs=2)
    assert planned.most["master"] == 4 * (9 + most + 38)


def test_a_tied_head_is_planned_with_the_embeddings() -> None:
    tied = ModelShape.from_numels({**NUMELS, "lm_head": (5,)}, tied=True)  # its bias
    planned = plan(tied, LisaConfig.load({"embeddings": {"every": 2}, "num_sampled_layers": 3}), world_size=1)
    assert planned.most["master"] - planned.typical["master"] == 4 * (101 + 5) - (round(4 * 101 / 2) + 4 * 5 // 2)


def test_a_plan_refuses_more_layers_than_there_are() -> None:
    with pytest.raises(ConfigError, match="the model has 3 layers, got 4"):
        plan(SHAPE, LisaConfig(num_sampled_layers=4), world_size=1)


def test_a_budget_below_the_largest_matrix_is_refused_where_it_is_planned() -> None:
    shape = ModelShape(layers=((92,), (36,), (36,), (92,)), of_blocks=2)
    config = LisaConfig.load({"unit": "matrix", "sampling_ratio": 0.3})
    with pytest.raises(ConfigError) as caught:
        plan(shape, config, world_size=1)
    assert str(caught.value) == (
        "lisa_config: sampling_ratio: a draw of matrices has 76 elements at most, fewer than the largest matrix with 92; set "
        "sampling_ratio to 0.359 or more"
    )
    assert plan(shape, config.model_copy(update={"sampling_ratio": 0.36}), world_size=1).most["exp_avg"] == 4 * 92
