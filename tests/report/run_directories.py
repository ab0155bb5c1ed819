"""Directories as runs leave them, of numbers that are made up: for reports."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from lisa_ds import records, run_log
from lisa_ds.sampling.statistics import Recording, Start, Writer, count_visits

BLOCKS = 30
CONFIG: dict[str, Any] = {
    "model": {"name_or_path": "builtin:smollm2-135m"},
    "data": {"path": "builtin:stdlib-docs", "max_length": 192},
    "method": "lisa",
    "lisa": {"num_sampled_layers": 2, "interval_steps": 5},
    "training": {"per_device_train_batch_size": 2, "bf16": True, "learning_rate": 5e-4, "max_steps": 40, "seed": 0},
    "deepspeed": None,
}


def write(
    directory: Path, method: str = "lisa", *, seed: int = 0, steps: int = 40, finished: bool = True, layers: bool = True,
    device: str = "2 x CPU", **changes: Any,
) -> Path:  # fmt: skip
    """A run of 40 steps, as far as ``steps``."""
    chance = random.Random(seed)
    config = {**CONFIG, "method": method, "training": {**CONFIG["training"], "seed": seed}, **changes}
    writer = run_log.Writer(directory / run_log.FILE_NAME)
    start = run_log.Start(
        config=config, steps=40, world_size=2, device=device, commit="abc123", versions={"torch": "2.13.0"}
    )
    writer.begin(0, 0.0, 0.0, start)
    slow = 1.0 if method == "lisa" else 1.7
    writer.append(0, 0.0, 0.0, {"eval_loss": 3.4})
    for step in range(2, steps + 1, 2):
        loss = 2.6 + 0.8 * math.exp(-step / 12) + chance.gauss(0, 0.03) - (0.05 if method == "full" else 0)
        switch = {"switch_s": 0.05, "lisa/interval": step // 5} if method == "lisa" else {}
        entry = {
            **{
                "loss": loss,
                "grad_norm": 3 * chance.random() + 1,
                "learning_rate": 5e-4 * math.sin(step / 40 * math.pi),
            },
            **{
                "tokens_per_second": 300 / slow,
                "max_rank_memory_gb": 2.1,
                "forward_s": 0.9,
                "backward_s": slow,
                **switch,
            },
            "optimizer_s": 0.3 * slow,
        }
        writer.append(step, step / 100, 2.2 * slow * step, entry)
        if step % 10 == 0:
            writer.append(step, step / 100, 2.2 * slow * step, {"eval_loss": loss + 0.05})
    if finished:
        sizes = {"weights": 134515008, "gradients": 35392320, "master": 70784640, "exp_avg": 70784640,
                 "exp_avg_sq": 70784640, "buckets": 33554432}  # fmt: skip
        sizes = sizes if method == "lisa" else {kind: 3 * size for kind, size in sizes.items()}
        for kind, size in sizes.items():
            record(directory, f"live_bytes/{kind}", method, size, "B")
        record(directory, "held_out_loss", method, 3.4, "nats", 0)
        record(directory, "held_out_loss", method, 2.7111, "nats", steps)
    if layers:
        write_layers(directory, method, intervals=steps // 5, seed=seed)
    return directory


def record(directory: Path, name: str, variant: str, value: float, unit: str, step: float | None = None) -> None:
    made = records.Record(
        name=name, variant=variant, value=value, unit=unit, device="2 x CPU", commit="abc123", versions={}, x=step
    )
    records.append(directory / "records.jsonl", made)


def write_layers(directory: Path, method: str, *, intervals: int, seed: int) -> None:
    chance = random.Random(seed)
    units = ("embeddings", *map(str, range(BLOCKS)), "rest")
    writer = Writer(
        directory / "layers.jsonl", Start(step=0, method=method, model="builtin:smollm2-135m", units=units, tied=True)
    )
    drawn: list[list[int]] = []
    for interval in range(intervals):
        drawn.append(sorted(chance.sample(range(BLOCKS), 2)))
        norms = {unit: 40.0 + int(unit) if unit.isdecimal() else 300.0 for unit in units}
        sampled = [unit for unit in units if method != "lisa" or not unit.isdecimal() or int(unit) in drawn[-1]]
        writer.append(
            Recording(
                step=5 * (interval + 1),
                interval=interval,
                weight_norm=norms,
                gradient_norm={unit: 0.5 if unit in sampled else None for unit in units},
                update_norm={unit: 1e-3 if unit in sampled else None for unit in units},
                sampled=tuple(sampled),
                gradient_steps=5,
                visits=count_visits(BLOCKS, drawn) if method == "lisa" else None,
                probabilities=(2 / BLOCKS,) * BLOCKS if method == "lisa" else None,
            )
        )


def write_comparison(directory: Path, seeds: int = 2) -> Path:
    """As `lisa-ds compare` leaves it."""
    for method in ("full", "lisa"):
        for seed in range(seeds):
            write(directory / "runs" / f"{method}-{seed}", method, seed=seed)
    few = {"num_sampled_layers": 4, "interval_steps": 5}
    for seed in range(seeds):
        write(directory / "runs" / f"lisa4-{seed}", "lisa", seed=seed, lisa=few)
    (directory / "comparison.jsonl").write_text("")
    (directory / "comparison.md").write_text(
        "# Methods\n\nBy **held-out loss**.\n\n| method | loss | GB |\n|---|---:|---:|\n"
        "| full | 2.70 ± 0.01 | 5.2 |\n| `lisa` | 2.71 <b>x</b> | 1.9 |\n"
    )
    return directory


def samples(directory: Path, *lines: dict[str, Any]) -> None:
    (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
