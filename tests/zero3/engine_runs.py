"""Bodies that run on real ranks: the engine's side of each test, returned as plain data for the parent to judge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.comm import coalesced_collectives
from torch import Tensor

import lisa_ds
from lisa_ds.ops import SegmentTable
from lisa_ds.optim import MaskedAdamW
from tests.zero3 import trajectory
from tests.zero3.trajectory import MICRO_BATCH, Case, Outcome


def build_engine(case: Case, *, shift: float = 0.0) -> Any:
    """A fresh LISA engine for ``case``; ``shift`` moves every initial weight, so that a resume has something to restore."""
    world_size = dist.get_world_size()
    config = trajectory.deepspeed_config(case, world_size)
    if case.dtype == "fp16":
        type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True
    with deepspeed.zero.Init(config_dict_or_path=config) if case.zero_init else contextlib.nullcontext():
        model = trajectory.build_model(case.tied, width=case.width, heads=case.heads)
    if case.zero_init:
        _load_seeded_weights(model, case)
    with torch.no_grad():
        for parameter in model.parameters() if shift else ():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=case.zero_init):
                parameter.data += shift
    if "adapters" in case.lisa:
        model = lisa_ds.add_adapters(model, case.lisa_config)
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        trajectory.parameter_groups(model), lr=1e-3, eps=trajectory.EPS
    )
    if case.masked is not None:
        optimizer = MaskedAdamW(trajectory.parameter_groups(model), lr=1e-3, eps=trajectory.EPS, **case.masked)
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=trajectory.make_scheduler if case.scheduler else None,
        config=config,
        lisa_config=case.lisa_config,
    )
    return engine


def _load_seeded_weights(model: Any, case: Case) -> None:
    """zero.Init scatters random numbers in its own order: give it the weights the reference starts from."""
    if not hasattr(_load_seeded_weights, "weights"):
        raise AssertionError("call seed_weights() before any zero.Init")
    weights = _load_seeded_weights.weights[case.tied, case.heads]  # type: ignore[attr-defined]
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(weights[name])


def seed_weights(heads: int = 1) -> None:
    _load_seeded_weights.weights = {  # type: ignore[attr-defined]
        (tied, heads): {n: p.detach().clone() for n, p in trajectory.build_model(tied, heads=heads).named_parameters()}
        for tied in (False, True)
    }


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """Every parameter, gathered, fp32; of a model whose layers are shared, on rank 0 alone."""
    if engine.autotp_size() > 1:
        return {n: p.float() for n, p in (engine._zero3_consolidated_16bit_state_dict() or {}).items()}
    result = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            result[name] = parameter.detach().float().clone()
    return result


@contextlib.contextmanager
def counted_reduce_scatter() -> Iterator[list[int]]:
    """Counts the bytes that enter reduce-scatter on this rank."""
    stock, count = coalesced_collectives.dist.reduce_scatter_fn, [0]

    def counting(output: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Any:
        count[0] += source.numel() * source.element_size()
        return stock(output, source, *args, **kwargs)

    coalesced_collectives.dist.reduce_scatter_fn = counting
    try:
        yield count
    finally:
        coalesced_collectives.dist.reduce_scatter_fn = stock


LossOf = Callable[[Any, Tensor], Tensor]
"""From an engine and the micro-batch of all ranks to this rank's loss."""


def own_loss(engine: Any, batch: Tensor) -> Tensor:
    """The loss on this rank's rows; ranks that share a layer have the same ones."""
    rank = dist.get_rank(engine.data_parallel_group)
    rows = batch[rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    loss: Tensor = engine(input_ids=rows, labels=rows).loss
    return loss


def train(
    engine: Any,
    case: Case,
    *,
    first: int = 0,
    loss_of: LossOf = own_loss,
    on_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Run ``case`` on this rank from step ``first``; losses are means over ranks."""
    losses, norms, layers = [], [], []
    with_own_rows = dist.get_world_size(engine.data_parallel_group) // engine.sequence_parallel_size
    for step, micro in enumerate(trajectory.micro_batches(case, with_own_rows)):
        if step < first:
            continue
        layers.append(engine.sampled_layers)
        total = 0.0
        for batch in micro:
            loss = loss_of(engine, batch)
            total += loss.item() / case.accumulation
            if case.direct_backward:
                loss.backward()
            else:
                engine.backward(loss * float("inf") if case.overflow_at == step else loss)
            if batch is micro[-1]:
                on_step(step)
            engine.step()
        mean = torch.tensor([total])
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        norms.append(float(engine.get_global_grad_norm()))
        after_step(step)
    return Outcome(losses, norms, full_parameters(engine), layers)


def run_case(case: Case, engine: Any = None, loss_of: LossOf = own_loss) -> Outcome:
    """One trajectory, with the counters that its tests read in ``extra``."""
    engine = engine or build_engine(case)
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    invalidations, in_flight = [0], [0]
    stock_invalidate, stock_fetch = coordinator._invalidate_trace, coordinator.fetch_sub_module

    def invalidate() -> Any:
        invalidations[0] += 1
        return stock_invalidate()

    def fetch(*args: Any, **kwargs: Any) -> Any:
        result = stock_fetch(*args, **kwargs)
        in_flight[0] = max(in_flight[0], len(engine.module.ds_inflight_param_registry))
        return result

    coordinator._invalidate_trace, coordinator.fetch_sub_module = invalidate, fetch
    reports, frozen_moved, calls_below, calls_at_lowest = [], [], [], []
    frozen: dict[str, Tensor] = {}
    calls = [0] * len(engine._stack.layers)
    handles = [
        # A module inside the block: transformers keeps the block's own hooks outside what it recomputes.
        block.input_layernorm.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, block in enumerate(engine._stack.layers)
    ]
    if case.drop_update_at is not None:
        stock_launch = engine.optimizer._launch

        def launch_without_the_first() -> Any:
            table = stock_launch()
            if engine._run.step != case.drop_update_at:
                return table
            first = len(engine.optimizer.fp16_groups[0])
            return SegmentTable(table.segments[first:], table.hypers[first:])

        engine.optimizer._launch = launch_without_the_first

    bytes_at_start = [0]

    def on_step(step: int) -> None:
        applied = engine._run.step
        parameters = dict(engine.module.named_parameters())
        if applied % case.interval_steps == 0:
            frozen.clear()
            frozen.update({n: p.ds_tensor.clone() for n, p in parameters.items() if not p.requires_grad})
        lowest = min((engine._stack.units[unit].block for unit in engine.sampled_layers), default=0)
        calls_below.append(calls[:lowest])
        calls_at_lowest.append(calls[lowest])
        calls[:] = [0] * len(calls)
        reports.append(
            {
                "layers": engine.sampled_layers,
                "roles": engine.sampled_roles,
                "report": engine.memory_report(),
                "reduced": count[0] - bytes_at_start[0],
                "gradients_none": all(p.grad is None for p in parameters.values()),
            }
        )
        bytes_at_start[0] = count[0]

    def after_step(step: int) -> None:
        parameters = dict(engine.module.named_parameters())
        for name, before in frozen.items():
            if not torch.equal(parameters[name].ds_tensor.view(torch.int8), before.view(torch.int8)):
                frozen_moved.append((step, name))

    with counted_reduce_scatter() as count:
        outcome = train(engine, case, loss_of=loss_of, on_step=on_step, after_step=after_step)
    for handle in handles:
        handle.remove()
    outcome.extra = {
        "shape": engine.model_shape,
        "history": engine.layer_history,
        "interval": engine.interval,
        "applied": engine._run.step,
        "skipped": engine.skipped_steps,
        "invalidations": invalidations[0],
        "in_flight": in_flight[0],
        "trace_complete": coordinator.is_complete_trace(),
        "reports": reports,
        "frozen_moved": frozen_moved,
        "calls_below": calls_below,
        "calls_at_lowest": calls_at_lowest,
        "accumulation_dtype": str(engine.optimizer.gradient_accumulation_dtype),
        "hooks": len(engine.optimizer._grad_acc_hooks),
    }
    engine.destroy()
    return outcome


def run_alone(case: Case) -> Outcome:
    """``case`` on these ranks, which have done nothing before."""
    deepspeed.init_distributed(dist_backend="gloo")
    seed_weights()
    return run_case(case)
