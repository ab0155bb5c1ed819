"""What the ranks of tests/zero3/test_lifetime.py do."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import lisa_ds
from tests.zero3 import engine_runs
from tests.zero3.memory_runs import resident_bytes
from tests.zero3.trajectory import Case, Outcome

CASES: list[dict[str, Any]] = [
    {"lisa": {}},
    {"lisa": {"optimizer": "adamw"}},
    {"lisa": {}, "zero": {"offload_optimizer": {"device": "cpu"}}},
    {"lisa": {"embeddings": {"every": 2}, "rewarm_steps": 3, "norm_growth_limit": 1.1}},
    {"lisa": {}, "persistent": 1000},
]


class Small(torch.nn.Module):
    """Embeddings, six blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(6))
        self.lm_head = torch.nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embed(ids)
        for layer in self.layers:
            rows = rows + torch.tanh(layer(rows))
        return torch.nn.functional.cross_entropy(self.lm_head(rows).flatten(0, 1), ids.flatten())


def run_lifetimes(engines: int, switches: int) -> dict[str, Any]:
    """Build and destroy engines, each of which switches so often; what stays of each, and what the process holds after some."""
    deepspeed.init_distributed(dist_backend="gloo")
    alive, held = [], {}
    for i in range(engines):
        refs = _live(CASES[i % len(CASES)], switches)
        gc.collect()
        alive.append([name for name, ref in refs.items() if ref() is not None])
        if i + 1 in (len(CASES), engines):  # each kind was there once
            held[i + 1] = _held()
    stock = _live(None, 2)
    gc.collect()
    return {"alive": alive, "held": held, "stock": [name for name, ref in stock.items() if ref() is not None]}


def _live(case: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    more = case or {}
    zero = {"stage": 3, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": more.get("persistent", 0)}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {**zero, **more.get("zero", {})}}
    arguments: dict[str, Any] = {"model": model, "optimizer": optimizer, "config": config}
    if case is None:
        engine, *_ = deepspeed.initialize(**arguments)
    else:
        engine, *_ = lisa_ds.initialize(**arguments, lisa_config={"interval_steps": 1, **case["lisa"]})
    for _ in range(steps):
        engine.backward(engine(torch.randint(0, 50, (2, 8))))
        engine.step()
    if case is not None:
        assert len(engine.layer_history) == steps + 1
    engine.destroy()
    objects = {"engine": engine, "optimizer": engine.optimizer, "model": model, "torch's": optimizer}
    return {name: weakref.ref(thing) for name, thing in objects.items()}


def _held() -> dict[str, int]:
    things = gc.get_objects()
    return {
        "tensors": sum(issubclass(type(thing), Tensor) for thing in things),
        "objects": len(things),
        "python threads": threading.active_count(),
        "threads": len(os.listdir("/proc/self/task")),
        "file handles": len(os.listdir("/proc/self/fd")),
        "resident": resident_bytes(),
    }


def run_destroyed_again(case: Case) -> Outcome:
    """An engine in training, while on one rank alone another is destroyed a second time, as the garbage collector does."""
    deepspeed.init_distributed(dist_backend="gloo")
    gone = engine_runs.build_engine(case)
    engine_runs.train(gone, case)
    gone.destroy()

    def loss_of(engine: Any, batch: Tensor) -> Tensor:
        loss = engine_runs.own_loss(engine, batch)
        if dist.get_rank() == 1:
            gone.destroy()
        return loss

    return engine_runs.train(engine_runs.build_engine(case), case, loss_of=loss_of)
