"""Ranks that share layers, sequences or second copies under the ZeRO-3 engine, against torch AdamW in one process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lisa_ds import records
from lisa_ds.engines.zero3.checkpoint.consolidate import read_weights
from lisa_ds.errors import CheckpointError
from lisa_ds.memory import Precision, state_bytes
from tests.ranks import Runs, run_ranks
from tests.shortened import shortened
from tests.training_runs import launch, write_run
from tests.zero3 import parallel_model, trajectory
from tests.zero3.parallel_runs import Cases, Shared, run, run_trainer
from tests.zero3.test_trajectory import BOUNDS, differences, layers_of
from tests.zero3.trajectory import Case, Outcome

pytestmark = pytest.mark.multirank

RANKS, SHARING = 4, 2
NEVER = {"embeddings": "never"}
CARE = {"embeddings": {"every": 2}, "lm_head": {"every": 3}, "rewarm_steps": 3, "norm_growth_limit": 1.02}
TWO = {"heads": 2, "autotp": SHARING}


def case(name: str, **changes: Any) -> Case:
    """A run of four intervals."""
    return Case(name, **{"steps": 7, "interval_steps": 2, **changes})


AUTOTP = [
    case("autotp", **TWO),
    case("autotp_zero_init_reentrant", zero_init=True, checkpointing="reentrant", **TWO),
    case("autotp_non_reentrant_offload", checkpointing="non_reentrant", offload=True, accumulation=2, **TWO),
    case("autotp_frozen_embeddings_reentrant", checkpointing="reentrant", lisa=NEVER, **TWO),
    case("autotp_tied", tied=True, **TWO),
    case("autotp_with_care", lisa=CARE, fresh=True, checkpointing="reentrant", **TWO),
]
SHARED = [
    Shared(case("mpu")),
    Shared(case("mpu_plain", clip=0.0), "plain"),
    Shared(case("mpu_partitioned_cpu_offload", offload=True, accumulation=2), "partitioned_cpu"),
    Shared(case("mpu_contiguous_given_optimizer", lisa={"optimizer": "adamw"}), "contiguous"),
    Shared(case("mpu_frozen_embeddings_torch", lisa=NEVER), "torch"),
    Shared(case("mpu_frozen_embeddings_partitioned", lisa=NEVER), "partitioned", hook=True),
]
SEQUENCES = [
    case("sequence", heads=2),
    case("sequence_reentrant_offload", heads=2, checkpointing="reentrant", offload=True, accumulation=2, lisa=NEVER),
]
HPZ = {"zero_hpz_partition_size": 2}
COPIES = [
    case("hpz", zero=HPZ),
    case("hpz_zero_init_offload", zero=HPZ, zero_init=True, checkpointing="reentrant", prefetch=True, offload=True),
]
ROUNDING = Case("rounded", dtype="bf16", steps=3, lisa={"optimizer": {"precision": "stochastic_rounding"}})

Build = Callable[[], nn.Module] | None
# Each case with the ranks that have rows of their own, and its model if it is not the usual one.
TRAINED: list[tuple[Case, int, Build]] = [
    *((each, RANKS // SHARING, None) for each in (*AUTOTP, *SEQUENCES)),
    *((shared.case, RANKS // SHARING, parallel_model.build) for shared in SHARED),
    *((each, RANKS, None) for each in COPIES),
]
IDS = [each.name for each, *_ in TRAINED]
SHORT = (AUTOTP[0].name, SHARED[0].case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs[str, list[Any]]:
    """By name of the run, what each rank tells of it."""
    cases = Cases(AUTOTP, SHARED, SEQUENCES, COPIES, ROUNDING)
    return Runs(lambda name: run_ranks(RANKS, run, folder, name, cases, folder, timeout_s=300))


def against_torch(ours: Outcome, case: Case, ranks: int, build: Build) -> dict[str, float]:
    theirs = trajectory.reference(replace(case, autotp=1), ranks, layers_of(case), build)
    assert ours.layers == theirs.layers
    if case.tied:  # an export names a shared weight twice
        ours.parameters = {name: p for name, p in ours.parameters.items() if name in theirs.parameters}
    assert ours.parameters.keys() == theirs.parameters.keys()
    return differences(ours, theirs)


@pytest.mark.by_case("case")
@pytest.mark.parametrize(
    ("case", "ranks", "build"),
    [pytest.param(*each, marks=[] if each[0].name in SHORT else [pytest.mark.more]) for each in TRAINED],
    ids=IDS,
)
def test_trajectory_equals_torch(runs: Any, case: Case, ranks: int, build: Build) -> None:
    ours = runs[case.name][0]
    assert len(ours.extra["history"]) == 4  # three switches
    found = against_torch(ours, case, ranks, build)
    assert all(found[key] <= BOUNDS[key] for key in BOUNDS), found


@pytest.mark.by_case("name")
@pytest.mark.parametrize("name", shortened(IDS, *SHORT))
def test_ranks_agree_on_draws_and_frozen_partitions_keep_every_bit(runs: Any, name: str) -> None:
    first = runs[name][0]
    for rank in runs[name]:
        assert rank.extra["history"] == first.extra["history"]
        assert rank.layers == first.layers
        assert rank.losses == first.losses
        assert rank.extra["frozen_moved"] == []


@pytest.mark.by_case("case")
@pytest.mark.parametrize(
    "case",
    shortened([*AUTOTP, *(shared.case for shared in SHARED), *SEQUENCES], *SHORT),
    ids=lambda case: case.name,
)
def test_live_bytes_equal_the_planner_and_the_formula(runs: Any, case: Case) -> None:
    for rank in runs[case.name]:
        extra = rank.extra
        for step, seen in enumerate(extra["reports"]):
            if step % case.interval_steps == 0:  # the moments of a fresh layer come with its first step
                continue
            report, sampled, roles = seen["report"], seen["layers"], seen["roles"]
            partition = sum(-(-numel // ranks) for unit, numel, ranks in extra["parts"] if unit in (*sampled, *roles))
            assert report["master"] + report["exp_avg"] + report["exp_avg_sq"] == 12 * partition
            assert report["weights"] == 4 * sum(-(-numel // ranks) for _, numel, ranks in extra["parts"])
            precision = Precision(4, 4, report["buckets"], offload_optimizer=case.offload)
            assert report == state_bytes(
                extra["shape"], sampled=sampled, roles=roles, world_size=extra["ranks"], precision=precision
            )


@pytest.mark.more
def test_shared_layers_are_a_part_on_each_rank(runs: Any) -> None:
    """Control of the bytes: half of the linears, whose weights are most of this model, are elsewhere."""
    whole = sum(p.numel() for p in parallel_model.build().parameters())
    for rank in runs["mpu"]:
        assert sum(numel for _, numel, _ in rank.extra["parts"]) < 0.6 * whole
        assert rank.extra["ranks"] == 2
    assert {rank.extra["ranks"] for rank in runs["sequence"]} == {4}  # sequences are shared, layers are not


@pytest.mark.by_case("name")
@pytest.mark.parametrize(
    "name", shortened([*(case.name for case in (*AUTOTP, *(shared.case for shared in SHARED))), "rounded"], *SHORT)
)
def test_copies_stay_alike(runs: Any, name: str) -> None:
    assert all(rank.extra["apart"] == [] for rank in runs[name])


@pytest.mark.more
def test_copies_rounded_by_streams_of_their_own_drift_apart(runs: Any) -> None:
    """Control of the above: what a stream for each rank would do."""
    assert any("layernorm" in name for name in runs["rounded apart"][0].extra["apart"])


def test_parts_that_are_not_marked_spoil_the_norm(runs: Any) -> None:
    """Control: DeepSpeed takes an unmarked part for a copy and counts it once, so that the check must fail."""
    found = against_torch(runs["unmarked"][0], replace(SHARED[0].case, steps=2), 2, parallel_model.build)
    assert found["grad_norm"] > 100 * BOUNDS["grad_norm"]


@pytest.mark.more
def test_all_reduced_gradients_of_a_shared_sequence_are_twice_as_large(runs: Any) -> None:
    """Control: the path of DeepSpeed that is refused; here without the refusal."""
    ours = runs["all-reduced"][0].grad_norms[0]
    assert ours == pytest.approx(2 * runs["sequence"][0].grad_norms[0], rel=1e-6)


@pytest.mark.more
def test_stale_second_copies_spoil_the_trajectory(runs: Any) -> None:
    """Control: second copies are used, and a step must drop those of what it has moved."""
    assert all(rank.extra["copied"] for rank in runs["hpz"])
    found = against_torch(runs["stale copies"][0], replace(COPIES[0], steps=5), RANKS, None)
    assert found["loss"] > 100 * BOUNDS["loss"]


@pytest.mark.more
def test_second_copies_are_counted_and_bounded(runs: Any) -> None:
    shape = [p.numel() for p in trajectory.build_model().parameters()]
    first, second = (4 * sum(-(-numel // ranks) for numel in shape) for ranks in (RANKS, 2))
    for rank in runs["hpz"]:
        for seen in rank.extra["reports"]:
            assert first < seen["report"]["weights"] <= first + second + 8 * len(shape)  # with what pads them


@pytest.mark.more
@pytest.mark.by_case("name")
@pytest.mark.parametrize("name", ["resumed", "copies resumed"])
def test_resume_is_bit_exact(runs: Any, name: str) -> None:
    for rank in runs[name]:
        seen = dict(rank)
        warm = seen.pop("warm start")
        assert all(seen.values()), seen
        assert ("2 ranks share each" in warm) is (name == "resumed")


@pytest.mark.more
def test_a_checkpoint_of_shared_layers_is_refused_elsewhere_with_the_remedy(runs: Any, folder: Path) -> None:
    assert runs["resumed"]  # which wrote the checkpoint
    for message in runs["not shared"]:
        assert "with each layer on 2 ranks and cannot be resumed with it on 1" in message
        assert "autotp_size" in message
    with pytest.raises(CheckpointError, match=r"parts of 2 ranks.*--resume auto writes"):
        read_weights(folder / "autotp" / "after3", torch.float32)


@pytest.mark.more
def test_a_reentrant_checkpoint_over_frozen_embeddings_is_refused(runs: Any) -> None:
    for message in runs["cut off"]:
        assert "backward gave them no gradient" in message
        assert "register_forward_hook" in message  # the remedy that mpu_frozen_embeddings_partitioned shows to work


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("experts", ["expert_parallel.enabled", "set it to false", "the Megatron engine"]),
        ("mesh", ["sequence_parallel_size, data_parallel_size", "pass mpu=UlyssesSPAttentionHF"]),
        ("mesh_param", ["mesh_param", "pass mpu=UlyssesSPAttentionHF"]),
        ("weights", ["zero_optimization.zero_quantized_weights", "set it to false"]),
        ("gradients", ["zero_optimization.zero_quantized_gradients", "set it to false"]),
        ("autotp and hpz", ["zero_hpz_partition_size", "tensor_parallel.autotp_size 2", "set it to 1"]),
        ("mpu and hpz", ["zero_hpz_partition_size", "layers shared by 2 ranks", "set it to 1"]),
        ("all-reduce", ["zero_optimization.reduce_scatter", "got False", "set it to true"]),
        ("too few heads", ["tensor_parallel.autotp_size", "got 2", "at most the number of key-value heads"]),
        ("another size", ["tensor_parallel.autotp_size", "got 4", "2 ranks share each layer", "a new process"]),
        ("stages", ["PipelineModule", "the Megatron engine"]),
    ],
)
def test_what_does_not_combine_is_refused_by_name(runs: Any, name: str, parts: list[str]) -> None:
    for rank in runs["refusals"]:
        message = rank[name]
        assert message.startswith("EngineError: ")
        assert all(part in message for part in parts), message


@pytest.mark.nightly
@pytest.mark.parametrize("tied", [False, True])
def test_an_attached_trainer_with_shared_layers_is_the_one_without(tmp_path: Path, tied: bool) -> None:
    (shared, held_out), *_ = run_ranks(4, run_trainer, tmp_path, tmp_path, 2, tied)
    (whole, expected), *_ = run_ranks(2, run_trainer, tmp_path, tmp_path, 1, tied)
    assert len(whole) == 4
    for ours, theirs in zip(shared, whole, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert held_out == pytest.approx(expected, abs=1e-4)


@pytest.mark.nightly
def test_a_run_file_with_shared_layers_tells_and_exports_what_one_without_does(tmp_path: Path) -> None:
    told, models = {}, {}
    uneven = {"path": "rows.jsonl", "eval_fraction": 0.3, "max_length": 64}  # 7 rows held out, for two groups
    for name, ranks, sharing in (("shared", 4, {"tensor_parallel": {"autotp_size": 2}}), ("whole", 2, {})):
        (tmp_path / name).mkdir()
        zero3 = {"train_batch_size": 2 * 2 * 2, "zero_optimization": {"stage": 3}, **sharing}
        write_run(tmp_path / name, data=uneven, deepspeed=zero3)
        done = launch(tmp_path / name, *IN_FP32, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        told[name] = [
            line for line in done.stdout.splitlines() if line.startswith("held-out loss") or "  loss " in line
        ]
        told[name] = [re.sub(r"  \S+ tok/s.*", "", line) for line in told[name]]
        told[name] += re.findall(r"\(([\d,]+) tokens", done.stdout)
        models[name] = load_file(tmp_path / name / "out/model/model.safetensors")
        read = {(r.name, r.variant): r.value for r in records.read(tmp_path / name / "out/records.jsonl")}
        assert read["live_bytes/weights", "lisa"] == read["live_bytes/weights", "full, planned"]
    assert told["shared"] == told["whole"]
    assert len(told["whole"]) == 6 + 1 + 1
    assert models["shared"].keys() == models["whole"].keys()
    # Near-zero gradients through Adam at its usual eps of 1e-8, at a learning rate of 1e-2.
    assert all(torch.allclose(value, models["whole"][name], atol=1e-3) for name, value in models["shared"].items())

    out = tmp_path / "shared/out"
    for gone in ("model", "checkpoint-6"):
        shutil.rmtree(out / gone)
    done = launch(tmp_path / "shared", *IN_FP32, "--resume", "auto", ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = load_file(out / "model/model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in models["shared"].items())


IN_FP32 = ["training.bf16=false", "training.report_to=none", "training.per_device_eval_batch_size=2"]
