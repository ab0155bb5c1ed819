"""Which of LISA's options pay? Held-out loss of a real model after fine-tuning on real data, option by option.

Usage: python benchmarks/ablate.py --out docs/results/ablation.jsonl [--stage all] [--workers 8] [--device cuda] [--deadline-s 360]
       python benchmarks/ablate.py --out docs/results/ablation.jsonl --stage report --doc docs/ablation.md --figure docs/results/ablation.png

`rates` chooses the learning rates of the base and of full fine-tuning on each data set, `screen` changes one factor of the base at a
time, `final` trains the best option of every factor on fresh seeds, `report` writes the tables from the records alone. Choices are
made on one part of the held-out rows and read on the other. A run whose record is in the file is not repeated, so a run that was cut
short is continued by the same command. docs/ablation.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablate_run
from ablate_plan import DATA, Progress, Protocol, Run

from lisa_ds import records
from lisa_ds.cache import cache_dir
from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError

STAGES = ("rates", "screen", "final")
PARTS = ("select", "verdict")


def main() -> None:
    """Run what is missing, then report."""
    arguments = parse()
    if arguments.stage == "report":
        return report(arguments)
    datasets = present(arguments)
    if arguments.prepare:
        for name, source in datasets.items():
            rows = ablate_run.tokens(source, arguments.model, ablate_run.token_file(arguments.cache, name, source))
            print(f"{name}: " + ", ".join(f"{len(part)} {key}" for key, part in rows.items()))
        return None
    protocol = Protocol(
        device=arguments.device,
        datasets=tuple(datasets),
        steps=arguments.steps,
        final_steps=arguments.final_steps,
        batch=arguments.batch,
        select_rows=arguments.select_rows,
        verdict_rows=arguments.verdict_rows,
        model=arguments.model_name,
    )
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    Campaign(arguments, protocol, datasets, stages).run()
    if arguments.doc or arguments.figure:
        report(arguments)
    return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--stage", choices=["all", *STAGES, "report"], default="all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the data sets lie")
    parser.add_argument("--datasets", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--cache", type=Path, default=cache_dir() / "ablate", help="tokens are kept here")
    parser.add_argument("--prepare", action="store_true", help="only tokenise")
    parser.add_argument("--model", default=Protocol.model, help="name or directory of the model")
    parser.add_argument("--model-name", default=Protocol.model, help="what the records call it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one rank; on a GPU they share it")
    parser.add_argument(
        "--deadline-s", type=float, help="seconds from now after which no run starts that would not end"
    )
    parser.add_argument("--max-runs", type=int, help="so many at most, for a try")
    parser.add_argument("--steps", type=int, default=Protocol.steps, help="of a run of `rates` and `screen`")
    parser.add_argument("--final-steps", type=int, default=Protocol.final_steps)
    parser.add_argument("--batch", type=int, default=Protocol.batch)
    parser.add_argument("--select-rows", type=int, default=Protocol.select_rows)
    parser.add_argument("--verdict-rows", type=int, default=Protocol.verdict_rows)
    parser.add_argument("--commit", help="what the records say, where there is no checkout to ask")
    parser.add_argument("--doc", type=Path, help="Markdown whose part between the marks is replaced by the tables")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return arguments


def present(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The data sets that are there, as ``data`` sections; of the others it is said that they are not."""
    found = {}
    for name in arguments.datasets:
        source = {**DATA[name], "path": str(arguments.data / DATA[name]["path"])}
        if Path(source["path"]).is_file() or ablate_run.token_file(arguments.cache, name, source).is_file():
            found[name] = source
        else:
            print(f"{name}: skipped, there is no {source['path']}")
    if not found:
        sys.exit(f"ablate: no data set in {arguments.data}; name their directory by --data")
    return found


def report(arguments: argparse.Namespace) -> None:
    """Tables and figure, from the records."""
    import ablate_report

    text = ablate_report.tables(list(records.read(arguments.out)))
    if arguments.doc:
        ablate_report.insert(arguments.doc, text)
    else:
        print(text)
    if arguments.figure:
        ablate_report.draw(list(records.read(arguments.out)), arguments.figure)


class Campaign:
    """Hands runs to processes until none is left, or none would end in time.

    Args:
        arguments: The command line.
        protocol: How much of everything.
        datasets: By name, the ``data`` sections.
        stages: Which of :data:`STAGES`.
    """

    def __init__(
        self, arguments: argparse.Namespace, protocol: Protocol, datasets: dict[str, Any], stages: tuple[str, ...]
    ) -> None:
        self.arguments, self.protocol, self.stages = arguments, protocol, stages
        self.start = time.monotonic()
        self.losses = measured(arguments.out)
        self.closed: set[str] = set()
        self.in_flight: dict[int, Run] = {}
        self.paces: list[float] = []  # seconds of a run for each of its steps
        self.commit, self.versions = arguments.commit or records.commit(), records.versions()
        self.device = "CPU"
        self.refused: dict[str, str] = {}
        self.begun = 0
        self.setup = {
            "model": arguments.model,
            "sources": datasets,
            "cache": str(arguments.cache),
            "limits": {"select": protocol.select_rows, "verdict": protocol.verdict_rows},
            "device": protocol.device,
            "bf16": True,
        }

    def run(self) -> None:
        """Start the processes, and end with them."""
        with tempfile.TemporaryDirectory() as scratch:
            self.scratch = scratch
            workers = [self._start(i) for i in range(self.arguments.workers)]
            if self.protocol.device == "cuda":
                self.device = gpu_name()
            pipes = {connection: i for i, (_, connection) in enumerate(workers)}
            idle: list[Any] = []
            while pipes:
                for connection in list(idle):
                    if (run := self._next()) is not None:
                        idle.remove(connection)
                        self.in_flight[pipes[connection]] = run
                        self.begun += 1
                        connection.send({**run.settings, "scratch": scratch})
                if idle and not self.in_flight and len(idle) == len(pipes):
                    break
                for connection in multiprocessing.connection.wait(list(pipes)):
                    worker = pipes[connection]  # type: ignore[index]
                    try:
                        kind, _, result = connection.recv()  # type: ignore[union-attr]
                    except (EOFError, ConnectionResetError):
                        log = Path(scratch, f"worker-{worker}.log")
                        print(f"worker {worker} ended:\n" + log.read_text()[-2000:], flush=True)
                        if (lost := self.in_flight.pop(worker, None)) is not None:
                            self.closed.add(lost.key)
                        del pipes[connection]  # type: ignore[arg-type]
                        continue
                    if kind == "ready":
                        self._say(f"worker {worker} is ready")
                    else:
                        self._take(self.in_flight.pop(worker), kind, result)
                    idle.append(connection)
            for connection in pipes:
                connection.send(None)
            for process, _ in workers:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
        left = len(Progress(self.protocol, self.losses, self.closed).open(self.stages))
        self._say(f"done; {left} runs that could start are left for the same command")
        for name, reason in sorted(self.refused.items()):
            print(f"not available: {name}: {reason}")

    def _start(self, index: int) -> tuple[Any, Any]:
        ours, theirs = multiprocessing.Pipe()
        environment = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "TOKENIZERS_PARALLELISM": "false",
            **({"DS_ACCELERATOR": "cpu"} if self.protocol.device == "cpu" else {}),
        }
        os.environ.setdefault("OMP_NUM_THREADS", "1" if self.arguments.workers > 1 else str(os.cpu_count() or 1))
        process = multiprocessing.get_context("spawn").Process(
            target=ablate_run.serve,
            args=(theirs, environment, f"{self.scratch}/worker-{index}.log", self.setup),
            daemon=True,
        )
        process.start()
        theirs.close()
        return process, ours

    def _next(self) -> Run | None:
        """The most urgent run that nobody does and that would end in time."""
        if self.arguments.max_runs is not None and self.begun >= self.arguments.max_runs:
            return None
        busy = {run.key for run in self.in_flight.values()}
        while True:
            progress = Progress(self.protocol, self.losses, self.closed)
            open_runs = [run for run in progress.open(self.stages) if run.key not in busy]
            refused = next((run for run in open_runs if not self._available(run)), None)
            if refused is None:
                break
            self.closed.add(refused.key)
        for run in open_runs:
            if self._in_time(run):
                return run
        return None

    def _available(self, run: Run) -> bool:
        if run.settings["method"] != "lisa":
            return True
        try:
            LisaConfig.load(run.settings["lisa"])
        except ConfigError as error:
            self.refused[run.arm] = str(error).splitlines()[0]
            return False
        return True

    def _in_time(self, run: Run) -> bool:
        if self.arguments.deadline_s is None:
            return True
        expected = statistics.quantiles(self.paces, n=10)[-1] if len(self.paces) > 1 else 0.0
        return time.monotonic() - self.start + expected * run.settings["steps"] < self.arguments.deadline_s

    def _take(self, run: Run, kind: str, result: Any) -> None:
        if kind == "failed":
            self.closed.add(run.key)
            self._say(f"failed: {run.stage} {run.arm} seed {run.settings['seed']}:\n{result}")
            return
        self.losses[run.key] = {part: result[part] for part in PARTS}
        if run.settings["steps"]:
            self.paces.append(result["seconds"] / run.settings["steps"])
        for record in self._records(run, result):
            records.append(self.arguments.out, record)
        s = run.settings
        self._say(
            f"{run.stage:6} {s['data']:9} {run.arm:40} lr {s['lr']:.2g} seed {s['seed']:2}: select {result['select']:.4f} "
            f"verdict {result['verdict']:.4f} in {result['seconds']:.1f} s ({result.get('train_seconds', 0):.1f} training, "
            f"{result.get('eval_seconds', 0):.1f} measuring)"
        )

    def _records(self, run: Run, result: dict[str, Any]) -> Iterator[records.Record]:
        values = [(f"{part}_loss", result[part], "nats") for part in PARTS]
        settings = {"key": run.key, "stage": run.stage, "workers": self.arguments.workers, **run.settings}
        for name, value, unit in (*values, ("run_time", result["seconds"], "s")):
            about = {"drawn": result.get("drawn", [])} if name == "run_time" else {}
            yield records.Record(
                name=name,
                variant=run.arm,
                value=value,
                unit=unit,
                x=run.settings["steps"],
                x_label="step",
                device=self.device,
                commit=self.commit,
                versions=self.versions,
                settings={**settings, **about},
            )

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)


def measured(path: Path) -> dict[str, dict[str, float]]:
    """By key of a run, what a file of records says of its losses; a run that lacks one has not been measured."""
    losses: dict[str, dict[str, float]] = {}
    for record in records.read(path) if path.exists() else ():
        if record.name.removesuffix("_loss") in PARTS:
            losses.setdefault(record.settings["key"], {})[record.name.removesuffix("_loss")] = record.value
    return {key: found for key, found in losses.items() if set(found) == set(PARTS)}


def gpu_name() -> str:
    """Of the first GPU."""
    import torch

    name: str = torch.cuda.get_device_name()
    return name


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
