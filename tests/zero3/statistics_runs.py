"""Bodies on real ranks: norms read from partitions, beside those of plain torch on what is gathered from all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor

from lisa_ds.engines.zero3.watch import statistics
from lisa_ds.layers import LayerStack
from tests.zero3 import engine_runs, trajectory
from tests.zero3.trajectory import Case

Table = dict[Any, float | None]


def run_lisa(case: Case) -> list[dict[str, Any]]:
    deepspeed.init_distributed(dist_backend="gloo")
    return run(case, engine_runs.build_engine(case))


def run_full(case: Case) -> list[dict[str, Any]]:
    deepspeed.init_distributed(dist_backend="gloo")
    return run(case, build_stock(case))


def build_stock(case: Case) -> Any:
    """DeepSpeed's own ZeRO-3 over everything."""
    model = trajectory.build_model(case.tied)
    optimizer = torch.optim.AdamW(trajectory.parameter_groups(model), lr=1e-3, eps=trajectory.EPS)
    config = trajectory.deepspeed_config(case, dist.get_world_size())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def run(case: Case, engine: Any) -> list[dict[str, Any]]:
    """For each whole interval, what was read and what it should be."""
    stack = getattr(engine, "stack", None) or LayerStack.from_model(engine.module)
    watched = statistics.watch(engine.optimizer, stack)
    assert statistics.watch(engine.optimizer, stack) is watched
    unit_of = trajectory.units(engine.module, case.lisa)
    mark = watched.mark()
    squares: list[Table] = []  # of gradients, by step of the interval
    before: dict[str, Tensor] = {}
    readings: list[dict[str, Any]] = []

    def ends_interval() -> bool:
        return bool(getattr(engine, "ends_interval", (watched.applied + 1) % case.interval_steps == 0))

    def on_step(step: int) -> None:
        scale = engine.optimizer.loss_scale
        gradients = {n: safe_get_full_grad(p) for n, p in trained(engine).items()}
        squares.append(by_unit(unit_of, {n: (g.double() / scale).square().sum().item() for n, g in gradients.items()}))
        if ends_interval():
            before.update({n: safe_get_full_fp32_param(p).double() for n, p in trained(engine).items()})

    def after_step() -> None:
        nonlocal mark
        if not before:
            return
        norms = watched.read(mark)
        weights = {n: gathered(p) for n, p in engine.module.named_parameters()}
        after = {n: safe_get_full_fp32_param(p).double() for n, p in trained(engine).items()}
        moved = {n: (after[n] - before[n]).square().sum().item() for n in after}
        formula = {n: update_square(engine, n, p, before[n]) for n, p in trained(engine).items()}
        units = set().union(*squares)
        means = {u: (sum(t[u] for t in squares if u in t) / sum(u in t for t in squares)) ** 0.5 for u in units}
        readings.append(
            {
                "read": (norms.weight, norms.gradient, norms.update),
                "weight": rooted(by_unit(unit_of, {n: w.double().square().sum().item() for n, w in weights.items()})),
                "gradient": means,
                "update": rooted(by_unit(unit_of, formula)),
                "moved": rooted(by_unit(unit_of, moved)),
                "last_gradient": rooted(squares[-1]),
                "trained": set(watched.trained(mark)),
                "blocks": blocks.take(),
            }
        )
        mark = watched.mark()
        squares.clear()
        before.clear()

    blocks = statistics.BlockGradients(watched, len(stack.units))  # adds up before it is asked
    watched.after_step.append(after_step)
    loop(engine, case, on_step, forget=squares)
    watched.remove()
    assert engine.optimizer.step.__func__ is type(engine.optimizer).step
    engine.destroy()
    return readings


def loop(engine: Any, case: Case, on_step: Callable[[int], None], forget: list[Table] | None = None) -> None:
    for step, micro in enumerate(trajectory.micro_batches(case, dist.get_world_size())):
        for batch in micro:
            loss = engine_runs.own_loss(engine, batch)
            engine.backward(loss * float("inf") if case.overflow_at == step else loss)
            if batch is micro[-1]:
                on_step(step)
            engine.step()
        if engine.optimizer.overflow and forget is not None:
            forget.pop()


def run_without_reduction(case: Case) -> list[dict[str, Any]]:
    """The same, of a reading that takes this rank's part for the whole: the check must see it."""
    statistics._reduced = lambda squares: squares.tolist()
    return run_lisa(case)


def trained(engine: Any) -> dict[str, Any]:
    held = {id(p) for group in engine.optimizer.fp16_groups for p in group}
    return {n: p for n, p in engine.module.named_parameters() if id(p) in held}


def gathered(parameter: Any) -> Tensor:
    parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, parameter.ds_tensor.detach())
    return torch.cat(parts)[: parameter.ds_numel]


def update_square(engine: Any, name: str, parameter: Any, before: Tensor) -> float:
    """AdamW's update by its textbook formula, on whole tensors in fp64."""
    optimizer = engine.optimizer
    position = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
    group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[position]]
    step = float(optimizer.optimizer.state[optimizer.fp32_partitioned_groups_flat[position]]["step"])
    first, second = (safe_get_full_optimizer_state(parameter, key).double() for key in ("exp_avg", "exp_avg_sq"))
    (beta1, beta2), lr = group["betas"], group["lr"]
    with contextlib.suppress(AttributeError):
        role = trajectory.units(engine.module)[name]
        lr *= getattr(engine._lisa, f"{role}_lr_scale", 1.0)
    direction = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + group["eps"])
    return float((lr * (direction + group["weight_decay"] * before)).square().sum())


def by_unit(unit_of: dict[str, Any], values: dict[str, float]) -> Table:
    table: Table = {}
    for name, value in values.items():
        table[unit_of[name]] = (table.get(unit_of[name]) or 0.0) + value
    return table


def rooted(table: Table) -> Table:
    return {unit: None if value is None else value**0.5 for unit, value in table.items()}


def with_shared_layers() -> dict[str, Any]:
    """Two ranks that hold a part of most weights and a copy of the others: what counts twice, and what once."""
    deepspeed.init_distributed(dist_backend="gloo")
    case = Case("shared", autotp=2, heads=2, clip=0.0, steps=1, interval_steps=1000)
    engine = engine_runs.build_engine(case)
    stack = LayerStack.from_model(engine.module)
    unit_of = trajectory.units(engine.module)
    watched = statistics.watch(engine.optimizer, stack)
    mark, found = watched.mark(), []
    before = {n: p.clone() for n, p in engine_runs.full_parameters(engine).items()}
    watched.after_step.append(lambda: found.append(watched.read(mark)))
    engine_runs.train(engine, case)
    after = engine_runs.full_parameters(engine)
    return {
        "norms": (found[0].weight, found[0].gradient, found[0].update),
        "weight": rooted(by_unit(unit_of, {n: float(p.double().square().sum()) for n, p in after.items()})),
        "grad_norm": float(engine.get_global_grad_norm()),
        "moved": rooted(
            by_unit(unit_of, {n: float((p - before[n]).double().square().sum()) for n, p in after.items()})
        ),
    }
