"""What the ranks of tests/zero3/test_compile.py do."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.utils import counters

import lisa_ds
from tests.zero3.lifetime_runs import Small

STEPS, INTERVAL = 8, 2


def run_compiled(backends: list[str | None]) -> list[dict[str, Any]]:
    """The same run by each backend: losses, blocks, and the graphs that were compiled up to each step."""
    deepspeed.init_distributed(dist_backend="gloo")
    return [_run(backend) for backend in backends]


def _run(backend: str | None) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Small()
    zero = {"stage": 3, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 0}
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero},
        lisa_config={"interval_steps": INTERVAL},
    )
    if backend:
        engine.compile(backend=backend)
    losses, graphs = [], []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = engine(torch.randint(0, 50, (2, 8), generator=draw))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
    layers = engine.layer_history
    engine.destroy()
    return {"losses": losses, "graphs": graphs, "layers": layers}
