"""Many small training runs, handed to processes that keep model and rows between them.

Who plans says, from what has been measured so far, which runs may start (``open_runs``); who measures is ``ablate_run``. A run whose record
is in the file is not repeated, so what was cut short is continued by the same command.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablate_run
from ablate_plan import Run

from lisa_ds import records
from lisa_ds.cluster.environment import free_port
from lisa_ds.compare.pace import Pace
from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError
from lisa_ds.evidence import PARTS

Losses = dict[str, dict[str, float]]
"""By key of a run, its held-out loss on each part."""


@dataclass(frozen=True)
class Settings:
    """Where and how runs are done, all alike."""

    out: Path
    """JSON lines, appended to."""

    model: str
    """Name or directory."""

    datasets: dict[str, dict[str, Any]]
    """By name, the ``data`` sections."""

    cache: Path
    """Where tokens are kept."""

    limits: dict[str, int]
    """Held-out rows of each part at most."""

    device: str = "cpu"
    workers: int = 1
    """Processes, each with one rank; on a GPU they share it."""

    bf16: bool = True
    deadline_s: float | None = None
    """Seconds from now after which no run starts that would not end."""

    max_runs: int | None = None
    commit: str | None = None
    device_name: str | None = None
    """What records say, if not the card's name."""


class Campaign:
    """Hands runs to processes until none is left, or none would end in time.

    Args:
        settings: Where and how.
        open_runs: Of what was measured, and the keys of runs that cannot be done: runs that may start, the most urgent first.
    """

    def __init__(self, settings: Settings, open_runs: Callable[[Losses, set[str]], list[Run]]) -> None:
        self.settings, self.open_runs = settings, open_runs
        self.pace = Pace(settings.deadline_s)
        self.losses = measured(settings.out)
        self.closed: set[str] = set()
        self.in_flight: dict[int, Run] = {}
        self.commit, self.versions = settings.commit or records.commit(), records.versions()
        self.device = settings.device_name or "CPU"
        self.refused: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        """By arm, why a run of it ended early."""
        self.begun = 0
        self.setup = {
            "model": settings.model,
            "sources": settings.datasets,
            "cache": str(settings.cache),
            "limits": settings.limits,
            "device": settings.device,
            "bf16": settings.bf16,
        }

    def run(self) -> None:
        """Start the processes, and end with them."""
        with tempfile.TemporaryDirectory() as scratch:
            self.scratch = scratch
            workers = [self._start(i) for i in range(self.settings.workers)]
            if self.settings.device == "cuda" and self.settings.device_name is None:
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
                            self.failed[lost.arm] = "its process ended"
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
        left = len(self.open_runs(self.losses, self.closed))
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
            **({"DS_ACCELERATOR": "cpu"} if self.settings.device == "cpu" else {}),
        }
        os.environ.setdefault("OMP_NUM_THREADS", "1" if self.settings.workers > 1 else str(os.cpu_count() or 1))
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
        if self.settings.max_runs is not None and self.begun >= self.settings.max_runs:
            return None
        busy = {run.key for run in self.in_flight.values()}
        while True:
            open_runs = [run for run in self.open_runs(self.losses, self.closed) if run.key not in busy]
            refused = next((run for run in open_runs if not self._available(run)), None)
            if refused is None:
                break
            self.closed.add(refused.key)
        for run in open_runs:
            if self.pace.in_time("run", run.settings["steps"]):
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

    def _take(self, run: Run, kind: str, result: Any) -> None:
        if kind == "failed":
            self.closed.add(run.key)
            self.failed[run.arm] = str(result).strip().splitlines()[-1]
            self._say(f"failed: {run.stage} {run.arm} seed {run.settings['seed']}:\n{result}")
            return
        self.losses[run.key] = {part: result[part] for part in PARTS}
        if run.settings["steps"]:
            self.pace.took("run", result["seconds"], run.settings["steps"])
        for record in self._records(run, result):
            records.append(self.settings.out, record)
        s = run.settings
        self._say(
            f"{run.stage:6} {s['data']:9} {run.arm:40} lr {s['lr']:.2g} seed {s['seed']:2}: select {result['select']:.4f} "
            f"verdict {result['verdict']:.4f} in {result['seconds']:.1f} s ({result.get('train_seconds', 0):.1f} training, "
            f"{result.get('eval_seconds', 0):.1f} measuring)"
        )

    def _records(self, run: Run, result: dict[str, Any]) -> Iterator[records.Record]:
        values = [(f"{part}_loss", result[part], "nats") for part in PARTS]
        settings = {"key": run.key, "stage": run.stage, "workers": self.settings.workers, **run.settings}
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
        print(f"[{self.pace.elapsed:5.0f} s] {text}", flush=True)


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
