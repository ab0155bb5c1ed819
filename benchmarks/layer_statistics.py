"""What layer statistics cost: a training step with them and without, interleaved, and the time inside them.

Usage: python benchmarks/layer_statistics.py --out docs/results/layer_statistics.jsonl

One rank, one process: SmolLM2-135M, the built-in model, by LISA (two layers, intervals of 20 steps) and by full fine-tuning under
DeepSpeed's own ZeRO-3. Every second step is watched: gradients are added up in it, and each watched step makes a recording, which
in a run one step in 20 does. The share is (gradients of 20 steps + one recording) / 20 steps without either.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

import lisa_ds
from lisa_ds import records
from lisa_ds.config import ModelConfig
from lisa_ds.engines.zero3.watch.statistics import UnitStatistics, watch
from lisa_ds.layers import LayerStack
from lisa_ds.models import load_model

EVERY = 20
"""Steps between two recordings, by default."""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; replaced if it exists")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29563")
    cuda = torch.cuda.is_available()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    torch.set_num_threads(arguments.threads)  # DeepSpeed has changed it
    device = "cuda" if cuda else "cpu"
    rows = torch.randint(0, 40000, (arguments.rows, arguments.length), device=device)
    arguments.out.unlink(missing_ok=True)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {arguments.threads} threads"
    settings = {"model": "builtin:smollm2-135m", "rows": arguments.rows, "length": arguments.length, "every": EVERY}
    for method in ("lisa", "full"):
        engine = build(method)
        times = measure(engine, rows, arguments.rounds, cuda)
        del engine
        for name, samples in times.items():
            spread = records.spread(samples)
            record(arguments.out, method, name, spread, "%" if name == "share" else "ms", where, settings)
            unit = "% of a step" if name == "share" else "ms"
            print(
                f"{method:5} {name:20} {spread.value:9.3f} {unit} ({spread.low:.3f} to {spread.high:.3f}, n={spread.n})"
            )


def measure(engine: Any, rows: torch.Tensor, rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Milliseconds of steps and of what is in them, and the share in percent of each pair of steps."""
    stack = LayerStack.from_model(engine.module)
    times: dict[str, list[float]] = {"step_without": [], "step_with": [], "gradients": [], "recording": [], "share": []}
    for index in range(-2, rounds):
        without = timed(lambda: step(engine, rows), cuda)
        watched = watch(engine.optimizer, stack)
        spent = Spent(watched, cuda)
        with_all = timed(lambda: step(engine, rows), cuda)
        watched.remove()
        if index < 0:
            continue
        share = 100 * (EVERY * spent.gradients + spent.recording) / (EVERY * without)
        found = (without, with_all, spent.gradients, spent.recording, share)
        for samples, value in zip(times.values(), found, strict=True):
            samples.append(value)
        print(f"round {index + 1} of {rounds}: {without:.0f} ms", file=sys.stderr)
    return times


class Spent:
    """Milliseconds inside the statistics of one step."""

    def __init__(self, watched: UnitStatistics, cuda: bool) -> None:
        self.gradients = self.recording = 0.0
        stock, mark = watched._gradient_squares, watched.mark()

        def gradients() -> torch.Tensor:
            found: list[torch.Tensor] = []
            self.gradients = timed(lambda: found.append(stock()), cuda)
            return found[0]

        def recording() -> None:
            self.recording = timed(lambda: watched.read(mark), cuda)

        watched._gradient_squares = gradients  # type: ignore[method-assign]
        watched.after_step.append(recording)


def build(method: str) -> Any:
    """The engine of a method."""
    model = load_model(ModelConfig(name_or_path="builtin:smollm2-135m"), torch.bfloat16)
    model.train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
        "steps_per_print": None,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if method == "full":
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    lisa = {"num_sampled_layers": 2, "interval_steps": 10**9}
    return lisa_ds.initialize(model=model, optimizer=optimizer, config=config, lisa_config=lisa)[0]


def step(engine: Any, rows: torch.Tensor) -> None:
    """Forward, backward and update."""
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()


def timed(call: Any, cuda: bool) -> float:
    """Milliseconds of a call."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def record(
    out: Path, method: str, name: str, spread: records.Spread, unit: str, where: str, settings: dict[str, Any]
) -> None:
    """Append one measurement."""
    records.append(
        out,
        records.Record(
            name=f"layer_statistics/{name}",
            variant=method,
            value=spread.value,
            low=spread.low,
            high=spread.high,
            n=spread.n,
            unit=unit,
            device=where,
            commit=records.commit(),
            versions=records.versions(),
            settings=settings,
        ),
    )


if __name__ == "__main__":
    main()
