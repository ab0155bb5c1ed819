"""Norms by unit from ZeRO-3 partitions, against plain torch on what all ranks hold together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Runs, run_ranks
from tests.shortened import shortened
from tests.zero3.statistics_runs import run_full, run_lisa, run_without_reduction, with_shared_layers
from tests.zero3.trajectory import Case

pytestmark = [pytest.mark.multirank, pytest.mark.by_case("case")]

SIZES = {"steps": 4, "interval_steps": 2}
LISA = [
    Case("lisa", **SIZES),
    Case("lisa_tied_bf16", dtype="bf16", tied=True, **SIZES),
    Case("lisa_overflow", dtype="fp16", overflow_at=2, **SIZES),
    Case("lisa_int8", lisa={"optimizer": {"moments": "int8"}}, **SIZES),
    Case(
        "lisa_sr",
        dtype="bf16",
        lisa={"optimizer": {"precision": "stochastic_rounding", "moments": "bf16"}},
        **SIZES,
    ),
    Case("lisa_matrices", lisa={"unit": "matrix", "block_rest": "with_block"}, **SIZES),
    Case("lisa_matrices_and_norms", lisa={"unit": "matrix", "embeddings": "never"}, accumulation=2, **SIZES),
    Case("lisa_offload", offload=True, offload_param=True, **SIZES),
    Case("lisa_given_optimizer", lisa={"optimizer": "adamw", "embeddings_lr_scale": 0.1}, **SIZES),
    Case("lisa_scheduler", scheduler=True, accumulation=2, lisa={"embeddings": "never"}, **SIZES),
]
FULL = [
    Case("full", clip=0.05, **SIZES),  # so small that every step clips, in place where a sub-group is one tensor
    Case("full_single_sub_groups", clip=0.05, zero={"sub_group_size": 1}, **SIZES),
    Case("full_bf16_accumulation", dtype="bf16", accumulation=2, **SIZES),
    Case("full_offload", offload=True, clip=0.05, **SIZES),
]
ODD = ["lisa_int8", "lisa_tied_bf16", "full_single_sub_groups"]

Read = Runs[tuple[int, str], list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """By number of ranks (2, or 3, which divide no parameter's size) and name of the case: each rank's readings."""
    folder = tmp_path_factory.mktemp("runs")
    bodies = {case.name: (run_lisa, case) for case in LISA} | {case.name: (run_full, case) for case in FULL}
    bodies["control"] = (run_without_reduction, LISA[0])
    return Runs(lambda key: run_ranks(key[0], bodies[key[1]][0], folder, bodies[key[1]][1]))


CASES = [(2, case) for case in (*LISA, *FULL)] + [(3, case) for case in (*LISA, *FULL) if case.name in ODD]
SHORT = ("lisa", "lisa_tied_bf16", "lisa_overflow", "full")
each = pytest.mark.parametrize(
    ("world_size", "case"),
    shortened(CASES, *((2, name) for name in SHORT)),
    ids=lambda value: getattr(value, "name", value),
)


@each
def test_norms_are_those_of_whole_tensors(runs: Read, world_size: int, case: Case) -> None:
    ranks = runs[world_size, case.name]
    intervals = (case.steps - (case.overflow_at is not None)) // case.interval_steps
    for readings in ranks:
        assert len(readings) == intervals
        for reading in readings:
            for read, expected in zip(reading["read"], ("weight", "gradient", "update"), strict=True):
                assert {unit: norm for unit, norm in read.items() if norm is not None} == pytest.approx(
                    reading[expected], rel=1e-5, abs=1e-12
                ), expected
            assert reading["trained"] == set(reading["gradient"])
            found, of_blocks = reading["blocks"], [reading["read"][1][block] for block in range(len(reading["blocks"]))]
            assert [norm is None for norm in found] == [norm is None for norm in of_blocks]
            assert [n for n in found if n is not None] == pytest.approx(
                [n for n in of_blocks if n is not None], rel=1e-12
            )
            assert all(norm > 0 for norm in reading["gradient"].values())


@each
def test_ranks_read_the_same(runs: Read, world_size: int, case: Case) -> None:
    first, *others = ([reading["read"] for reading in readings] for readings in runs[world_size, case.name])
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", ["lisa", "full", "lisa_given_optimizer"])
def test_an_update_is_what_the_weights_moved_by(runs: Read, name: str) -> None:
    for reading in runs[2, name][0]:
        moved = reading["moved"]
        assert {unit: norm for unit, norm in reading["read"][2].items() if norm is not None} == pytest.approx(
            moved, rel=1e-3
        )


def test_gradients_are_averaged_over_the_steps_of_an_interval(runs: Read) -> None:
    """The mean over the two steps of an interval differs from that of the last one alone."""
    readings = runs[2, "lisa"][0]
    for reading in readings:
        assert reading["read"][1]["embeddings"] != pytest.approx(reading["last_gradient"]["embeddings"], rel=1e-4)
    trained = [{unit for unit in reading["trained"] if isinstance(unit, int)} for reading in readings]
    assert [len(blocks) for blocks in trained] == [2, 2]  # read before the switch
    assert all(
        reading["read"][1][block] is None
        for reading in readings
        for block in range(5)
        if block not in reading["trained"]
    )


def test_where_ranks_share_layers_a_copy_counts_once(tmp_path: Path) -> None:
    first, second = run_ranks(2, with_shared_layers, tmp_path)
    assert first["norms"] == second["norms"]
    weight, gradient, update = first["norms"]
    assert weight == pytest.approx(first["weight"], rel=1e-5)
    assert sum(norm**2 for norm in gradient.values() if norm) ** 0.5 == pytest.approx(first["grad_norm"], rel=1e-5)
    moved = {unit: norm for unit, norm in first["moved"].items() if norm > 0}
    assert {unit: norm for unit, norm in update.items() if norm is not None} == pytest.approx(moved, rel=1e-3)


def test_a_reading_of_one_rank_s_part_is_seen(runs: Read) -> None:
    reading = runs[3, "control"][0][0]
    assert reading["read"][0] != pytest.approx(reading["weight"], rel=1e-2)
    assert {u: n for u, n in reading["read"][1].items() if n is not None} != pytest.approx(
        reading["gradient"], rel=1e-2
    )
