"""Gathers what the runs of a comparison measured in one file of records, from which its tables and figures are drawn.

The first record, ``comparison``, says what was asked for and how far it is; then come, of each arm, the planner's bytes, and of each run
what it measured. ``settings`` of a run's records hold ``stage``, ``seed``, ``rate``, ``part``, and ``run``, the name of its directory; its
whole config is with ``steps``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lisa_ds import records
from lisa_ds.compare.protocol import Progress, Run
from lisa_ds.compare.request import Request
from lisa_ds.compare.results import Result
from lisa_ds.errors import LisaError
from lisa_ds.files import whole
from lisa_ds.memory.run_settings import Forecast
from lisa_ds.memory.settings import forecast_of
from lisa_ds.records import Record

FILE = "comparison.jsonl"
"""In the directory of a comparison."""

_STATE = ("gradients", "master", "moments")
"""Parts of a plan that are gradients and optimizer state."""


@dataclass(frozen=True)
class About:
    """What the records say beside measurements."""

    request: Request
    rows: Mapping[str, int]
    """By part, ``train`` included."""

    workers: int
    command: str

    @cached_property
    def planned(self) -> dict[str, Forecast]:
        """Of each arm whose architecture and method the planner knows, its plan."""
        found = {}
        for arm, config in self.request.configs.items():
            try:
                found[arm] = forecast_of(config, num_ranks=self.request.ranks, on_cpu=self.request.on_cpu)
            except LisaError:
                continue
        return found


def read_about(out: Path) -> Record | None:
    """The first record of a comparison's file; None if there is no such file.

    Raises:
        DataError: It is not a comparison's.
    """
    from lisa_ds.report.comparison.read import about

    return about(out / FILE) if (out / FILE).exists() else None


def write(about: About, results: Mapping[Run, Result], failures: Mapping[Run, str], progress: Progress) -> None:
    """Write the file anew; it appears whole or not at all."""
    file = about.request.out / FILE
    with whole(file) as unfinished:
        for record in _records(about, results, failures, progress):
            records.append(unfinished, record)


def _records(
    about: About, results: Mapping[Run, Result], failures: Mapping[Run, str], progress: Progress
) -> Iterator[Record]:
    request = about.request
    first = next(iter(results.values()), None)
    common: dict[str, Any] = {
        "device": first.device if first else machine(),
        "commit": first.commit if first else records.commit(),
        "versions": dict(first.versions) if first else records.versions(),
    }
    choices = {arm.name: progress.choice(arm.name) for arm in request.arms}
    yield Record(
        name="comparison",
        variant="all",
        value=len(results),
        unit="runs",
        x=request.protocol.num_runs,
        x_label="runs in all",
        settings={
            "identity": request.identity(),
            "arms": {arm.name: request.configs[arm.name].method for arm in request.arms},
            "chosen": {
                name: choice and {"rate": choice.rate, "at_edge": choice.at_edge} for name, choice in choices.items()
            },
            "reference": request.reference,
            "model": request.base.model.name_or_path,
            "data": request.base.data.path,
            "rows": dict(about.rows),
            "workers": about.workers,
            "machine": machine(),
            "command": about.command,
            "failed": [[run.arm, run.stage, run.seed, run.rate, why] for run, why in failures.items()],
        },
        **common,
    )
    for arm, plan in about.planned.items():
        parts = {part: plan.phases["step"].get(part, 0) + plan.host.get(part, 0) for part in ("weights", *_STATE)}
        state = sum(parts[part] for part in _STATE)
        for name, value in (("peak", plan.peak), ("state", state), ("weights", parts["weights"])):
            yield Record(name=f"planned_bytes/{name}", variant=arm, value=value, unit="B", **common)
    for run, result in results.items():
        yield from _measured(request, run, result)


def _measured(request: Request, run: Run, result: Result) -> Iterator[Record]:
    settings = {"stage": run.stage, "seed": run.seed, "rate": run.rate, "part": run.part, "run": request.name(run)}

    def record(name: str, value: float, unit: str, x: float | None = None, **more: Any) -> Record:
        return Record(
            name=name,
            variant=run.arm,
            value=value,
            unit=unit,
            x=x,
            x_label="" if x is None else "step",
            device=result.device,
            commit=result.commit,
            versions=dict(result.versions),
            settings={**settings, **more},
        )

    diverged = not math.isfinite(result.loss)
    yield record("steps", result.steps, "steps", config=dict(result.config), diverged=diverged)
    for step, (loss, seconds) in sorted(_curve(result).items()):
        yield record("held_out_loss", loss, "nats", step, **({} if seconds is None else {"seconds": seconds}))
    if result.seconds is not None:
        yield record("training_seconds", result.seconds, "s", result.steps)
    for name, (value, unit) in result.values.items():
        if name in ("tokens_per_second", "max_rank_memory_gb") or name.startswith("live_bytes/"):
            yield record(name, value, unit)
    for part, seconds in (result.log.seconds_by_phase() if result.log is not None else {}).items():
        if part != "other":  # which is the rest of training_seconds
            yield record(f"seconds_per_step/{part}", seconds, "s")


def _curve(result: Result) -> dict[int, tuple[float, float | None]]:
    """Held-out loss and seconds of training until then, by step; no value that is not a number."""
    points = result.log.series("eval_loss") if result.log is not None else []
    curve: dict[int, tuple[float, float | None]] = {point.step: (point.value, point.seconds) for point in points}
    if result.loss_before is not None:
        curve[0] = (result.loss_before, 0.0)
    if result.steps:
        curve[result.steps] = (result.loss, result.seconds)
    return {step: point for step, point in curve.items() if math.isfinite(point[0])}


def machine() -> str:
    """The processor of this host, its cores that may be used, and its memory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
