"""Bodies that run on four ranks, of which some share layers, a sequence, or a copy of the weights."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

import lisa_ds
from tests import parallel_model, trajectory, zero3_runs
from tests.parallel_model import Mpu
from tests.trajectory import Case, Outcome

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cpu": {"cpu_checkpointing": True},
    "partitioned": {"partition_activations": True},
    "partitioned_cpu": {"partition_activations": True, "cpu_checkpointing": True},
    "contiguous": {
        "partition_activations": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": parallel_model.LAYERS,
    },
    "non_reentrant": {},
}
"""What ``deepspeed.checkpointing`` is configured by."""


@dataclass(frozen=True)
class Shared:
    """A run of the model written by hand."""

    case: Case
    tensor: int = 2  # ranks that share its layers
    checkpoint: str = ""
    hook: bool = False  # let the embeddings' output require grad


def build_shared(run: Shared) -> tuple[Any, Mpu]:
    mpu = Mpu(run.tensor)
    model = parallel_model.share_(parallel_model.build(), mpu)
    model.train()
    config = trajectory.deepspeed_config(run.case, mpu.get_data_parallel_world_size())
    if run.checkpoint:
        config["activation_checkpointing"] = CHECKPOINTS[run.checkpoint]
        deepspeed.checkpointing.configure(mpu, deepspeed_config=config)
        wrap = "non_reentrant_checkpoint" if run.checkpoint == "non_reentrant" else "checkpoint"
        model.body.checkpoint = getattr(deepspeed.checkpointing, wrap)
    if run.hook:
        model.body.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    optimizer = torch.optim.AdamW(trajectory.parameter_groups(model), lr=1e-3, eps=trajectory.EPS)
    engine, *_ = lisa_ds.initialize(
        model=model, optimizer=optimizer, config=config, mpu=mpu, lisa_config=run.case.lisa_config
    )
    return engine, mpu


def run_shared(run: Shared) -> Outcome:
    engine, mpu = build_shared(run)
    try:
        outcome = zero3_runs.run_case(run.case, engine)
    finally:
        engine.destroy()
    outcome.parameters = parallel_model.whole(outcome.parameters, mpu)
    return outcome


def run_cases(cases: list[Case], shared: list[Shared]) -> dict[str, Any]:
    """All of them, one after another on the same ranks."""
    deepspeed.init_distributed(dist_backend="gloo")
    zero3_runs.seed_weights(2)
    r: dict[str, Any] = {}
    for case in cases:
        try:
            r[case.name] = zero3_runs.run_case(case)
        except Exception:
            r[case.name] = traceback.format_exc()
    for run in shared:
        try:
            r[run.case.name] = run_shared(run)
        except Exception:
            r[run.case.name] = traceback.format_exc()
        # as a script that ends: DeepSpeed keeps the last mpu
        from deepspeed.utils import groups

        groups.mpu = None
    return r
