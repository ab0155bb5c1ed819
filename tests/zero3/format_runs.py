"""What the ranks of tests/zero3/test_formats.py do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor

import lisa_ds
from lisa_ds.errors import LisaError
from lisa_ds.memory import Precision, state_bytes
from lisa_ds.ops import reference, segments
from tests.zero3 import trajectory
from tests.zero3.engine_runs import build_engine, train
from tests.zero3.trajectory import MICRO_BATCH, Case


def run_format(case: Case, folder: Path) -> dict[str, Any]:
    """The case once, beside the specification stepping the same gradients; then resumed from its middle."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine = build_engine(case)
    wrong: list[str] = []
    frozen_moved: list[str] = []
    launch = engine.optimizer._launch

    def remembering() -> Any:
        table = launch()
        engine.twins = [_clone(segment) for segment in table.segments]
        engine.twin_table = segments.SegmentTable(engine.twins, table.hypers, seed=engine.optimizer.rounding_seed)
        engine.twin_of = table
        return table

    engine.optimizer._launch = remembering
    before: dict[str, Tensor] = {}

    def on_step(step: int) -> None:
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                before[name] = parameter.ds_tensor.clone()

    bytes_wrong = []

    def after_step(step: int) -> None:
        # The specification, from the state before the step, with the clip coefficient that the norm gives.
        norm = float(engine.get_global_grad_norm())
        factor = torch.tensor(min(1.0, case.clip / (norm + 1e-6)) if case.clip else 1.0)
        torch._foreach_add_(engine.twin_table.steps, 1)
        reference.masked_adamw_(engine.twin_table, factor, torch.zeros(()))
        for i, (ours, theirs) in enumerate(zip(engine.twin_of.segments, engine.twins, strict=True)):
            for key, bound in (("weight", 1e-2), ("master", 1e-3)):
                a, b = getattr(ours, key), getattr(theirs, key)
                if a is not None and a.numel() and float((a.float() - b.float()).abs().max()) > bound:
                    wrong.append(f"step {step}, segment {i}, {key}: {float((a.float() - b.float()).abs().max())}")
                # All but a few must be the same to the bit: the same random numbers, the same codes.
                # An update that is one rounding away may fall on the other side of a random number.
                if a is not None and key == "weight" and int((a != b).sum()) > max(1, 0.02 * a.numel()):
                    wrong.append(f"step {step}, segment {i}: {int((a != b).sum())} of {a.numel()} weights differ")
        for name, parameter in engine.module.named_parameters():
            # As bits: ZeRO-3's padding, which nobody initialises, may be NaN.
            if name in before and not torch.equal(
                parameter.ds_tensor.view(torch.int16), before[name].view(torch.int16)
            ):
                frozen_moved.append(name)
        before.clear()
        if engine.has_moments:
            bytes_wrong.append(report_difference(engine, case))

    folder.mkdir(parents=True, exist_ok=True)

    def keep(step: int) -> None:
        after_step(step)
        if step == 4:
            engine.save_checkpoint(str(folder), tag="middle")

    outcome = train(engine, case, on_step=on_step, after_step=keep)
    accessors = read_accessors(engine, case)
    engine.destroy()
    resumed = build_engine(case, shift=0.5)
    resumed.load_checkpoint(str(folder), tag="middle")
    again = train(resumed, case, first=5)
    resumed.destroy()
    exported = None
    if dist.get_rank() == 0:
        from lisa_ds.engines.zero3.checkpoint.consolidate import read_weights

        exported = {name: value.shape for name, value in read_weights(folder, torch.bfloat16).items()}
    other = replace(case, masked=None, lisa={**case.lisa, "optimizer": {"precision": "mixed"}})
    message = ""
    if case.lisa["optimizer"] != {"precision": "mixed"}:
        engine = build_engine(other)
        try:
            engine.load_checkpoint(str(folder), tag="middle")
        except LisaError as error:
            message = str(error)
        engine.destroy()
    size = sum(file.stat().st_size for file in folder.glob("middle/*optim_states.pt"))
    return {
        "losses": outcome.losses,
        "wrong": wrong,
        "frozen_moved": frozen_moved,
        "bytes_wrong": [difference for difference in bytes_wrong if difference],
        "bytes_checked": len(bytes_wrong),
        "resumed_losses": again.losses,
        "resumed_equal": all(torch.equal(again.parameters[n], p) for n, p in outcome.parameters.items()),
        "accessors": accessors,
        "exported": exported,
        "refused": message,
        "file": size,
    }


def report_difference(engine: Any, case: Case) -> dict[str, tuple[int, int]]:
    """Kinds of ``memory_report()`` that are not what the planner says."""
    report = engine.memory_report()
    weight, gradient = engine.get_data_types()
    state_format = engine.state_format
    precision = Precision(
        weight_bytes=weight.itemsize,
        gradient_bytes=gradient.itemsize,
        bucket_bytes=report["buckets"],
        master_bytes=4 if state_format.precision == "mixed" else 0,
        moments=state_format.moments_of(weight),
        offload_optimizer=case.offload,
    )
    planned = state_bytes(
        engine.model_shape, sampled=engine.sampled_layers, world_size=dist.get_world_size(), precision=precision
    )
    return {kind: (report[kind], planned[kind]) for kind in report if report[kind] != planned[kind]}


def read_accessors(engine: Any, case: Case) -> dict[str, Any]:
    """DeepSpeed's own accessors, on a sampled block's weight, within a step."""
    rank = dist.get_rank()
    rows = next(trajectory.micro_batches(case, dist.get_world_size()))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    weight = engine.module.model.layers[engine.sampled_layers[0]].mlp.up_proj.weight
    read = {"parameter": safe_get_full_fp32_param(weight), "gradient": safe_get_full_grad(weight)}
    refused = ""
    for key in ("exp_avg", "exp_avg_sq"):
        try:
            read[key] = safe_get_full_optimizer_state(weight, key)
        except LisaError as error:
            refused = str(error)
    with deepspeed.zero.GatheredParameters([weight]):
        distance = float((read["parameter"] - weight.detach().float()).abs().max())
    engine.step()
    return {
        "distance": distance,
        "shapes": [tuple(value.shape) for value in read.values()],
        "positive": "exp_avg_sq" in read and bool((read["exp_avg_sq"] >= 0).all()),
        "moments": float(read["exp_avg"].abs().max()) if "exp_avg" in read else 0.0,
        "refused": refused,
    }


def _clone(segment: segments.Segment) -> segments.Segment:
    from tests.ops.adamw_cases import clone

    return clone(segment)


def run_refusals() -> dict[str, str]:
    """What the fused step refuses, on one rank."""
    deepspeed.init_distributed(dist_backend="gloo")
    messages = {}

    def attempt(name: str, make: Any, case: Case, **lisa: Any) -> None:
        model = trajectory.build_model()
        try:
            engine, *_ = lisa_ds.initialize(
                model=model,
                optimizer=make(trajectory.parameter_groups(model)),
                config=trajectory.deepspeed_config(case, 1),
                lisa_config={**case.lisa_config, **lisa},
            )
            messages[name] = "nothing was refused"
            engine.destroy()
        except LisaError as error:
            messages[name] = f"{type(error).__name__}: {error}"

    adamw, bf16 = torch.optim.AdamW, Case("bf16", dtype="bf16")
    fp32, offload = Case("fp32"), Case("offload", dtype="bf16", offload=True)
    attempt("sgd", torch.optim.SGD, fp32)
    attempt("sgd kept", torch.optim.SGD, fp32, optimizer="adamw")
    attempt("adam", torch.optim.Adam, fp32)
    attempt("adam without decay", lambda groups: torch.optim.Adam([p for g in groups for p in g["params"]]), fp32)
    attempt("amsgrad", lambda groups: adamw(groups, amsgrad=True), fp32)
    attempt("rounded fp32", adamw, fp32, optimizer={"precision": "stochastic_rounding"})
    attempt("rounded offload", adamw, offload, optimizer={"precision": "stochastic_rounding"})
    weights = Case("weights", dtype="bf16", offload_param=True)
    attempt("rounded offload of weights", adamw, weights, optimizer={"precision": "stochastic_rounding"})

    class Own(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    attempt("own step", Own, fp32)
    attempt("ours", lisa_ds.MaskedAdamW, bf16)
    attempt("ours, clipping", lambda groups: lisa_ds.MaskedAdamW(groups, max_grad_norm=1.0), bf16)
    attempt("ours, otherwise", lambda groups: lisa_ds.MaskedAdamW(groups, moments="int8"), bf16)
    return messages


def run_rounding() -> list[Tensor]:
    """The random numbers that round one weight's partition in each of four visits, a step each."""
    deepspeed.init_distributed(dist_backend="gloo")
    case = Case("rounding", dtype="bf16", lisa={"optimizer": {"precision": "stochastic_rounding"}}, interval_steps=1)
    engine = build_engine(case)
    seen: list[Tensor] = []
    launch = engine.optimizer._launch

    def remembering() -> Any:
        table = launch()
        place = engine.optimizer._number_of[engine.module.lm_head.weight.ds_id]
        segment = next(i for i, each in enumerate(table.segments) if each.stream & 0xFFFFFFFF == place)
        seed = int(table.addresses[segment, segments.SEED])
        seen.append(reference.random_bits(seed, 1, torch.arange(64)))
        return table

    engine.optimizer._launch = remembering
    train(engine, replace(case, steps=4))
    engine.destroy()
    return seen
