"""What a rank holds and sends as ranks are added: state and gradients, and the bytes that enter reduce-scatter in a step.

Usage: python benchmarks/scaling.py --out docs/results/scaling.jsonl --figure docs/results/scaling.png

`real` starts so many ranks that talk through gloo, each training a small Llama for two steps. `simulated` runs
benchmarks/simulate_rank.py: one rank of many whose peers are imagined, with every tensor it would hold in memory. Lines of the
figure are lisa_ds.memory's, points are live tensors. Nothing here is a time: no GPU is used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling_plan import LLAMA_7B, LLAMA_70B, SMALL, TINYLLAMA, planned, shape_of

from lisa_ds import LisaConfig, records
from lisa_ds.memory import SAMPLED_KINDS

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the ranks, which share few cores

REAL = (1, 2, 4, 8)
SIMULATED: dict[tuple[str, str], tuple[int, ...]] = {
    (TINYLLAMA, "lisa"): (64, 128, 256, 512, 1024),
    (TINYLLAMA, "full"): (64, 128, 256, 512, 1024),
    (LLAMA_7B, "lisa"): (64, 256, 1024),
    (LLAMA_7B, "full"): (64, 256, 1024),
    (LLAMA_70B, "lisa"): (16, 64),  # 16 take 14 GB of memory
}
LISA = {"num_sampled_layers": 2, "interval_steps": 10**9, "seed": 0}


def main() -> None:
    """Measure what is asked for, record it, and draw all there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what is measured again is replaced in it")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--only", nargs="*", choices=["real", "simulated"], default=["real", "simulated"])
    parser.add_argument("--models", nargs="*", default=sorted({model for model, _ in SIMULATED}), help="of `simulated`")
    parser.add_argument("--world-sizes", nargs="*", type=int, help="of `simulated`, from those it has")
    parser.add_argument("--taken", type=Path, help="records of simulate_rank.py, to add as they are")
    arguments = parser.parse_args()
    if "real" in arguments.only:
        for world_size in REAL:
            replace(arguments.out, measure_real(world_size))
    if "simulated" in arguments.only:
        for (model, method), world_sizes in SIMULATED.items():
            for world_size in world_sizes:
                if model in arguments.models and world_size in (arguments.world_sizes or world_sizes):
                    replace(arguments.out, measure_simulated(model, method, world_size))
    if arguments.taken is not None:
        replace(arguments.out, simulated(arguments.taken))
    if arguments.figure is not None:
        from scaling_figure import draw

        draw(list(records.read(arguments.out)), arguments.figure)


def replace(path: Path, measured: Iterator[records.Record]) -> None:
    """Put ``measured`` into the file, in place of the same measurements of before."""
    new = list(measured)
    keys = {_key(record) for record in new}
    old = list(records.read(path)) if path.exists() else []
    path.unlink(missing_ok=True)
    for record in [*(record for record in old if _key(record) not in keys), *new]:
        records.append(path, record)
    for record in new:
        print(
            f"{record.settings['model']:36} {record.variant:5} {record.x:5.0f} ranks  {record.name:32} {record.value:15,.0f}"
        )


def _key(record: records.Record) -> tuple[Any, ...]:
    return record.name, record.variant, record.x, record.settings["model"], record.settings["ranks"]


# --- real ranks ---------------------------------------------------------------------------------------------------------


def measure_real(world_size: int) -> Iterator[records.Record]:
    """Both methods on real ranks; the largest value of any rank."""
    sys.path.append(str(ROOT))
    from tests.ranks import run_ranks

    for method in ("lisa", "full"):
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_ranks(world_size, train_small, Path(folder), method, timeout_s=300)
        live = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        settings = {"model": "small", "config": SMALL, "ranks": "real, gloo"}
        yield from recorded(method, world_size, live, settings)


def train_small(method: str) -> dict[str, int]:
    """On one rank: two steps of a small Llama; bytes alive after the second, and those that entered reduce-scatter in it."""
    import deepspeed
    import torch
    from simulate_rank import build_engine, from_config

    from lisa_ds.engines.zero3.watch.memory_report import memory_report
    from tests.zero3.engine_runs import counted_reduce_scatter

    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    engine = build_engine(method, from_config(SMALL), LisaConfig.load(LISA))
    rows = torch.randint(0, SMALL["vocab_size"], (1, 16))
    for _ in range(2):
        with counted_reduce_scatter() as count:
            engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    report = memory_report(engine.optimizer, engine.module.parameters())
    return {**{kind: report[kind] for kind in ("weights", *SAMPLED_KINDS)}, "reduce_scatter": count[0]}


# --- imagined ranks -------------------------------------------------------------------------------------------------------


def measure_simulated(model: str, method: str, world_size: int) -> Iterator[records.Record]:
    """One rank of ``world_size``, after its last step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        script = [sys.executable, str(ROOT / "benchmarks/simulate_rank.py")]
        options = ["--model", model, "--method", method, "--world-size", str(world_size), "--out", str(out)]
        subprocess.run([*script, *options], check=True, stdout=subprocess.DEVNULL)
        yield from simulated(out)


def simulated(path: Path) -> Iterator[records.Record]:
    """What records of simulate_rank.py say of each rank after its last step."""
    live: dict[tuple[str, str, int], dict[str, int]] = {}
    commits = {}
    for record in records.read(path):  # a later phase overwrites an earlier one
        name = record.name.removeprefix("simulated_bytes/").removeprefix("simulated_")
        rank = record.settings["model"], record.variant, int(record.x or 0)
        live.setdefault(rank, {})[name] = int(record.value)
        commits[rank] = record.commit
    for rank, seen in live.items():
        model, method, world_size = rank
        kinds = {kind: seen[kind] for kind in ("weights", *SAMPLED_KINDS, "resident", "peak_resident")}
        settings = {"model": model, "ranks": "one, fake group"}
        yield from recorded(method, world_size, kinds, settings, commit=commits[rank])


def recorded(
    method: str, world_size: int, live: dict[str, int], settings: dict[str, Any], commit: str | None = None
) -> Iterator[records.Record]:
    """A record for each kind, with what the planner says of it."""
    said = planned(shape_of(settings["model"]), method, world_size)
    for kind, value in live.items():
        if kind in said and value != said[kind]:
            raise SystemExit(f"{settings['model']} on {world_size} ranks: {kind}: {value} live, {said[kind]} planned")
        yield records.Record(
            name=f"bytes/{kind}",
            variant=method,
            value=value,
            unit="bytes",
            device="CPU",
            commit=commit or records.commit(),
            versions=records.versions(),
            x=world_size,
            x_label="ranks",
            settings=settings | ({"planned": said[kind]} if kind in said else {}),
        )


if __name__ == "__main__":
    main()
