"""Matrices as the unit of sampling: the engine against torch AdamW in one process, its memory, its resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_ds.config import LisaConfig
from lisa_ds.engines.common import policies
from lisa_ds.layers import LayerStack
from lisa_ds.memory import Precision, plan, state_bytes
from lisa_ds.sampling import LayerSampler
from tests.ranks import Runs, run_ranks
from tests.shortened import shortened
from tests.zero3 import trajectory
from tests.zero3.checkpoint_runs import run_resume
from tests.zero3.engine_runs import run_alone
from tests.zero3.memory_runs import run_many_switches
from tests.zero3.test_checkpoint import same_bits
from tests.zero3.test_trajectory import BOUNDS, differences
from tests.zero3.trajectory import Case, Outcome

pytestmark = [pytest.mark.multirank, pytest.mark.by_case("case")]

ALONE = {"embeddings": "never", "lm_head": "never", "rest": "never", "block_rest": "never"}
ONE = {"interval_steps": 1}


def case(name: str, lisa: dict[str, Any] | None = None, **changes: Any) -> Case:
    return Case(name, lisa={"unit": "matrix", **(lisa or {})}, **changes)


CASES = [
    case("plain"),
    case("every step", **ONE),
    case("cyclic, accumulation", {"sampler": "cyclic"}, accumulation=2, scheduler=True, **ONE),
    case("no clip, head and embeddings never", {"embeddings": "never", "lm_head": "never"}, clip=0.0),
    case("matrices alone, reentrant", ALONE, checkpointing="reentrant", **ONE),
    case("norms with their block", {"block_rest": "with_block", "embeddings": "never"}, checkpointing="reentrant"),
    case("norms never, non-reentrant", {"block_rest": "never"}, checkpointing="non_reentrant"),
    case("tied", {"embeddings": {"every": 2}}, tied=True),
    case("tied, zero.Init", {"embeddings": "sampled", "seed": 4}, tied=True, zero_init=True, checkpointing="reentrant"),
    case("offload", {"block_rest": "with_block"}, offload=True, accumulation=2),
    case("given optimizer, small buckets", {"optimizer": "adamw"}, small_buckets=True, prefetch=True),
    case("care", {"rewarm_steps": 5, "norm_growth_limit": 1.02, "block_rest": "with_block"}, fresh=True),
    case("by scores", {"sampler": {"name": "grad_norm", "score": "ema"}}, interval_steps=2),
    case("a fifth", {"sampling_ratio": 0.2}, **ONE),
    case("adapters", {"adapters": {"rank": 2}, "embeddings": "never", "lm_head": "never"}, **ONE),
    case("adapters, blocks", {"adapters": {"rank": 3, "learning_rate_scale": 4.0}, "unit": "block"}, checkpointing="reentrant"),
    case("no moments", {"optimizer": {"moments": "none"}}, **ONE),
    case("no moments, cyclic", {"optimizer": {"moments": "none"}, "sampler": "cyclic"}, accumulation=2, scheduler=True),
    case("no moments, offload", {"optimizer": {"moments": "none"}, "rewarm_steps": 2, "block_rest": "with_block"}, offload=True),
]  # fmt: skip
ROUNDED = case("bf16", {"block_rest": "with_block"}, dtype="bf16", interval_steps=2)
NAMED = {each.name: each for each in (*CASES, ROUNDED)}
SHORT = ("every step", "norms with their block", "no moments", "adapters")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs[tuple[int, str], list[Outcome]]:
    """By number of ranks and name of the case, what each rank saw."""
    folder = tmp_path_factory.mktemp("runs")
    return Runs(lambda key: run_ranks(key[0], run_alone, folder, NAMED[key[1]], timeout_s=300))


def built(case: Case) -> torch.nn.Module:
    model = trajectory.build_model(case.tied)
    if "adapters" in case.lisa:
        trajectory.put_adapters(model, case.lisa["adapters"])
    return model


def draws_of(case: Case) -> list[tuple[int, ...]]:
    config, model = LisaConfig.load(case.lisa_config), built(case)
    stack = LayerStack.of_run(model, config)
    sampler = LayerSampler(len(stack.layers), config, matrices=policies.matrices(stack, config))
    return [sampler.layers_at(interval) for interval in range(case.steps)]


on_ranks = pytest.mark.parametrize(
    ("ranks", "case"),
    [
        *shortened([(2, each) for each in CASES], *((2, name) for name in SHORT)),
        *(pytest.param(3, each, marks=pytest.mark.more) for each in CASES[1::4]),
    ],
    ids=lambda value: getattr(value, "name", value),
)


@on_ranks
def test_trajectory_equals_torch(runs: Any, ranks: int, case: Case) -> None:
    ours = runs[ranks, case.name][0]
    by_scores = isinstance(case.lisa.get("sampler"), dict)  # which only a run has: its draws are taken as they were
    draws = ours.extra["history"] if by_scores else draws_of(case)
    theirs = trajectory.reference(case, ranks, draws)
    assert ours.layers == theirs.layers
    assert len({*ours.layers}) >= 3
    found = differences(ours, theirs)
    assert all(found[key] <= BOUNDS[key] for key in BOUNDS), found
    for outcome in runs[ranks, case.name]:
        assert outcome.extra["history"] == ours.extra["history"]
        assert outcome.layers == ours.layers
        assert outcome.extra["frozen_moved"] == []
    if case.lisa["unit"] == "block":
        return
    # Beside a matrix that trains others of its block are frozen.
    model = built(case)
    units, blocks = trajectory.units(model, case.lisa), {name: name.split(".")[2] for name in names_in_blocks(model)}
    trained = {
        blocks[name]
        for name in blocks
        if units[name] in ours.layers[0] and "proj." in name and units[name] != "adapters"
    }
    assert any(blocks[name] in trained and units[name] not in ours.layers[0] for name in blocks if "proj" in name)


def names_in_blocks(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".layers." in name]


def test_a_matrix_too_many_fails_the_trajectory(runs: Any) -> None:
    """The control: the reference trains one matrix more in the second interval."""
    wrong = draws_of(NAMED["every step"])
    wrong[1] = tuple(sorted({*wrong[1], next(unit for unit in range(35) if unit not in wrong[1])}))
    found = differences(runs[2, "every step"][0], trajectory.reference(NAMED["every step"], 2, wrong))
    assert found["parameter"] > 10 * BOUNDS["parameter"]


@on_ranks
def test_live_bytes_are_those_of_the_draw_and_never_above_the_plan(runs: Any, ranks: int, case: Case) -> None:
    gradient = 4
    config = LisaConfig.load(case.lisa_config)
    for outcome in runs[ranks, case.name]:
        shape = outcome.extra["shape"]
        for step, seen in enumerate(outcome.extra["reports"]):
            report = seen["report"]
            moments = config.optimizer.moments
            precision = Precision(4, gradient, report["buckets"], moments=moments, offload_optimizer=case.offload)
            draw = {"sampled": seen["layers"], "world_size": ranks, "precision": precision}
            expected = state_bytes(shape, roles=seen["roles"], **draw)
            most = plan(shape, config, world_size=ranks, precision=precision).most
            kinds = [kind for kind in expected if step % case.interval_steps or not kind.startswith("exp_avg")]
            assert {kind: report[kind] for kind in kinds} == {kind: expected[kind] for kind in kinds}
            assert all(report[kind] <= most[kind] for kind in most)


@pytest.mark.more
def test_in_bf16_it_follows_a_reference_in_bf16(runs: Any) -> None:
    ours, theirs = runs[2, "bf16"][0], trajectory.reference(ROUNDED, 2, draws_of(ROUNDED))
    found = differences(ours, theirs)
    assert found["loss"] < 2e-3, found
    assert found["parameter"] < 2e-3, found


@pytest.mark.more
def test_resume_within_an_interval_is_bit_exact(tmp_path: Path) -> None:
    resumed = replace(NAMED["cyclic, accumulation"], interval_steps=4, dtype="bf16")
    for rank in run_ranks(2, run_resume, tmp_path, resumed, tmp_path, [4, 6], timeout_s=240):
        whole = rank["uninterrupted"]
        for saved in (4, 6):
            part = rank[saved]
            assert part.losses == whole.losses[saved:]
            assert part.layers == whole.layers[saved:]
            assert all(torch.equal(part.parameters[name], value) for name, value in whole.parameters.items())
            assert all(same_bits(a, b) for a, b in zip(part.extra["state"], whole.extra["state"], strict=True))
            assert part.extra["history"] == whole.extra["history"]


@pytest.mark.more
def test_memory_is_flat_over_two_hundred_switches(tmp_path: Path) -> None:
    wide = replace(NAMED["every step"], width=4)
    config = LisaConfig.load(wide.lisa_config)
    assert config.interval_steps == 1
    for (seen,) in run_ranks(2, run_many_switches, tmp_path, [(wide, 200)], timeout_s=560):
        warm = seen[4:]
        assert seen[-1]["switches"] == 201
        assert len({step["layers"] for step in seen}) > 30
        assert len({step["hooks"] for step in warm}) == 1
        most = max(sum(step["report"][kind] for kind in ("gradients", "master")) for step in seen)
        assert all(sum(step["report"][kind] for kind in ("gradients", "master")) > 0.8 * most for step in seen)
        resident = [step["resident"] for step in warm]
        assert resident[-1] - resident[0] < 8 * 2**20
