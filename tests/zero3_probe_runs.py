"""What the ranks of tests/test_zero3_probe.py do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lisa_ds.engines.zero3.probe import Probe
from tests import zero3_runs
from tests.trajectory import Case
from tests.zero3_runs import build_engine, full_parameters

BATCHES, ROWS, LENGTH = 3, 2, 12
SEED = 5


def batches(rank: int) -> list[Tensor]:
    """The calibration data of one rank."""
    draw = torch.Generator().manual_seed(1000 + rank)
    return [torch.randint(0, 101, (ROWS, LENGTH), generator=draw) for _ in range(BATCHES)]


def calibration(module: nn.Module) -> Iterator[Tensor]:
    for rows in batches(dist.get_rank()):
        yield module(input_ids=rows, labels=rows).loss


def make_probe(engine: Any, **kwargs: Any) -> Probe:
    data = kwargs.pop("calibration", calibration)
    return Probe(engine.optimizer, engine.module, engine._stack, engine._frontier, data, seed=SEED, **kwargs)


def with_dropout(engine: Any) -> Any:
    for layer in engine.module.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return engine


def snapshot(engine: Any) -> dict[str, Any]:
    """Everything that scoring must leave alone, copied."""
    optimizer = engine.optimizer
    states = [optimizer.optimizer.state[master] for master in optimizer.fp32_partitioned_groups_flat]
    return {
        "weights": [p.ds_tensor.clone() for p in engine.module.parameters()],
        "master": [master.detach().clone() for master in optimizer.fp32_partitioned_groups_flat],
        "moments": [value.clone() for state in states for value in state.values() if torch.is_tensor(value)],
        "gradients": [optimizer.grad_partitions_flat_buffer.clone()],
        "random": [torch.get_rng_state()],
        "requires_grad": [p.requires_grad for p in engine.module.parameters()],
        "training": [m.training for m in engine.module.modules()],
        "whole": [p.ds_status.name for p in engine.module.parameters()],
        "no_gradient": [p.grad is None for p in engine.module.parameters()],
        "counters": [
            optimizer.micro_step_id,
            optimizer._epilogue_ran_this_backward,
            optimizer._backward_active_depth,
            optimizer._backward_seen_this_step,
            optimizer._hooks_fired_this_backward,
            optimizer._max_expected_hooks_seen,
            optimizer._remaining_grad_acc_hooks,
            [(b.elements, len(b.params)) for b in optimizer.ipg_buckets.values()],
            engine.micro_steps,
            engine.global_steps,
        ],
        "methods": sorted(k for k, v in vars(optimizer).items() if callable(v)),
        "checkpoint_functions": [getattr(m, "_gradient_checkpointing_func", None) for m in engine.module.modules()],
        "input_hooks": [len(getattr(m, "_require_grads_hooks", ())) for m in engine.module.modules()],
        "module_hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.module.modules()],
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if torch.is_tensor(a) else a == b

    return [
        kind
        for kind in before
        if len(before[kind]) != len(after[kind])
        or not all(same(a, b) for a, b in zip(before[kind], after[kind], strict=True))
    ]


def run_scores(cases: list[Case], sizes: list[int], kinds: list[str]) -> dict[str, dict[str, Any]]:
    """For each case, the scores after two steps of training, with the weights they belong to and what they disturbed."""
    deepspeed.init_distributed(dist_backend="gloo")
    zero3_runs.seed_weights()
    result: dict[str, dict[str, Any]] = {}
    for case in cases:
        engine = with_dropout(build_engine(case))
        for step_case in [case]:
            zero3_runs.train(engine, step_case)
        before = snapshot(engine)
        scores = {
            (kind, size): make_probe(engine, probe_blocks=size).scores(kind)
            for kind in kinds
            for size in (sizes if kind in ("accumulated", "hutchinson") else sizes[:1])
        }
        result[case.name] = {
            "scores": scores,
            "changed": changed(before, snapshot(engine)),
            "parameters": full_parameters(engine),
        }
        engine.destroy()
    return result


def run_beside_training(cases: list[Case], kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Each case with and without scores after some of its steps: how far apart the two runs are."""
    deepspeed.init_distributed(dist_backend="gloo")
    zero3_runs.seed_weights()
    result = {}
    for case in cases:

        def run(score: Callable[[Any], None], case: Case = case) -> Any:
            engine = with_dropout(build_engine(case))
            torch.manual_seed(31 + dist.get_rank())
            outcome = zero3_runs.train(
                engine, case, after_step=lambda step: score(engine) if step in (0, 2, 3) else None
            )
            engine.destroy()
            return outcome

        def score(engine: Any) -> None:
            for kind in kinds:
                make_probe(engine, probe_blocks=2).scores(kind)

        plain, probed = run(lambda engine: None), run(score)
        result[case.name] = difference(plain, probed)
    return result


def difference(plain: Any, probed: Any) -> dict[str, Any]:
    return {
        "losses": plain.losses == probed.losses,
        "grad_norms": plain.grad_norms == probed.grad_norms,
        "layers": plain.layers == probed.layers,
        "moved": [n for n, p in plain.parameters.items() if not torch.equal(p, probed.parameters[n])],
    }


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
