"""What the ranks of tests/zero3/test_memory.py do."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import lisa_ds
from tests.zero3 import trajectory
from tests.zero3.engine_runs import build_engine, full_parameters
from tests.zero3.trajectory import MICRO_BATCH, Case


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_many_switches(cases: list[tuple[Case, int]]) -> list[list[dict[str, Any]]]:
    """For each case and number of switches: train one step, switch, and so on; what is alive after each fifth switch."""
    deepspeed.init_distributed(dist_backend="gloo")
    return [_many_switches(case, switches) for case, switches in cases]


def _many_switches(case: Case, switches: int) -> list[dict[str, Any]]:
    engine = build_engine(case)
    rank = dist.get_rank()
    rows = next(trajectory.micro_batches(case, dist.get_world_size()))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    seen = []
    for step in range(switches + 1):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()  # interval_steps is 1: this also switches
        if step % 5:  # looking at every object of the process takes longer than the step
            continue
        engine.optimizer._table = (
            None  # a switch has dropped the launch's views already, unless the same blocks were drawn
        )
        gc.collect()
        seen.append(
            {
                "report": engine.memory_report(),
                "resident": resident_bytes(),
                "hooks": len(engine.optimizer._grad_acc_hooks),
                "tensors": sum(1 for thing in gc.get_objects() if isinstance(thing, Tensor)),
                "states": len(engine.optimizer.optimizer.state),
                "layers": engine.sampled_layers,
                "roles": engine.sampled_roles,
                "norms": len(engine.optimizer._growth_limit.state_dict()),
                "switches": len(engine.layer_history) - 1,
            }
        )
    engine.destroy()
    return seen


def run_activations(case: Case) -> dict[str, Any]:
    """Bytes saved for backward, and the loss: stock engine, ours with all blocks, ours with 2 of 8."""
    deepspeed.init_distributed(dist_backend="gloo")
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config)

    draw = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randint(0, 512, (4, 64), generator=draw)
    config = trajectory.deepspeed_config(case, dist.get_world_size())

    def measure(engine: Any) -> tuple[int, list[float]]:
        losses, saved = [], 0
        own = {parameter.data_ptr() for parameter in engine.module.parameters()}
        for _ in range(2):
            storages: dict[int, int] = {}

            def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
                if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in own:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = engine(input_ids=rows, labels=rows).loss
            saved = sum(storages.values())
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return saved, losses

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    result = {}
    full = model()
    stock, *_ = deepspeed.initialize(model=full, optimizer=optimizer(full), config=config)
    result["stock, 8 of 8"] = measure(stock)
    stock.destroy()
    part = model()
    for block in part.model.layers[2:]:
        block.requires_grad_(False)
    stock, *_ = deepspeed.initialize(model=part, optimizer=optimizer(part), config=config)
    result["stock, 2 of 8"] = measure(stock)
    stock.destroy()
    for name, layers in (("ours, 8 of 8", range(8)), ("ours, 2 of 8", range(2))):
        ours = model()
        engine, *_ = lisa_ds.initialize(
            model=ours,
            optimizer=optimizer(ours),
            config=config,
            lisa_config={"interval_steps": 1000, "sampler": {"name": "fixed", "layers": list(layers)}},
        )
        result[name] = measure(engine)
        engine.destroy()
    return result


def run_with_frozen_parameters() -> dict[str, Any]:
    """A model of which the user has frozen a part, and whose ``requires_grad`` an adapter library turns on again."""
    from lisa_ds.memory import Precision, state_bytes

    deepspeed.init_distributed(dist_backend="gloo")
    case = Case("frozen", interval_steps=2)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = next(trajectory.micro_batches(case, world_size))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    model = trajectory.build_model()
    for block in model.model.layers:
        block.self_attn.requires_grad_(False)
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=trajectory.deepspeed_config(case, world_size),
        lisa_config=case.lisa_config,
    )
    before = full_parameters(engine)
    for _ in range(2):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
    report = engine.memory_report()
    planned = state_bytes(
        engine.model_shape,
        sampled=engine.sampled_layers,
        world_size=world_size,
        precision=Precision(4, 4, bucket_bytes=report["buckets"]),
    )
    for block in model.model.layers:  # as PEFT's disable_adapter leaves it
        block.mlp.requires_grad_(True)
    for _ in range(3):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    after = full_parameters(engine)
    return {
        "bytes_as_planned": report == planned,
        "frozen_moved": [n for n in before if "self_attn" in n and not torch.equal(before[n], after[n])],
        "frozen_requires_grad": [n for n, p in model.named_parameters() if "self_attn" in n and p.requires_grad],
        "moved": sum("mlp" in n and not torch.equal(before[n], after[n]) for n in before),
    }


class Uneven(torch.nn.Module):
    """Two blocks and nothing else; the second is eight times the first."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 512)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(64, size), torch.nn.Tanh(), torch.nn.Linear(size, 64)) for size in sizes
        )

    def forward(self, rows: Tensor) -> Tensor:
        for block in self.blocks:
            rows = rows + block(rows)
        return rows.float().square().mean()


def run_uneven_switches(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Switch from the small block to the large one; live bytes at the start, at the peak and of each kind."""
    from benchmarks.live_bytes import LiveBytes

    deepspeed.init_distributed(dist_backend="gloo")
    seen = []
    for case in cases:
        model, bf16 = Uneven(), case.get("bf16", True)
        zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, **case.get("zero", {})}
        config = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": bf16}, "zero_optimization": zero}
        config |= {"data_types": {"grad_accum_dtype": case.get("gradients")}}
        optimizer = torch.optim.AdamW(model.parameters())
        lisa = {"num_sampled_layers": 1, "interval_steps": 100, **case.get("lisa", {})}
        engine, *_ = lisa_ds.initialize(model=model, optimizer=optimizer, lisa_config=lisa, config=config)
        engine.switch_to([0])
        for _ in range(2):
            engine.backward(engine(torch.randn(2, 64, dtype=torch.bfloat16 if bf16 else torch.float32)))
            engine.step()
        before, live = engine.memory_report(), LiveBytes()
        live.adopt()
        start = live.now
        with live, live.phase("switch"):
            engine.switch_to([1])
        peak = live.peaks["switch"]
        seen.append({"start": start, "peak": peak, "before": before, "after": engine.memory_report()})
        engine.destroy()
    return seen
