"""Reads what a run has written into its directory: how far it is, what it measured, and in what order its rows came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lisa_ds import records, run_log
from lisa_ds.config.row_order import SIZES, differing, rows_of_step
from lisa_ds.errors import DataError
from lisa_ds.run_log import RECORDS, RunLog

_LAST = "max_rank_memory_gb"
"""Of the numbers that every summary holds, one of the last: where it is, the others are."""

State = Literal["none", "begun", "saved", "finished"]
"""Of a run: nothing is there; it has begun, but there is no checkpoint; it can be resumed; it has ended."""


@dataclass(frozen=True)
class Result:
    """What a finished run measured."""

    loss: float
    """Held-out loss after training; infinite where it diverged."""

    loss_before: float | None
    """Before training; of a resumed run as its first attempt measured it. None where nobody did."""

    steps: int
    skipped_steps: int
    device: str
    commit: str
    versions: Mapping[str, str]
    values: Mapping[str, tuple[float, str]]
    """Numbers of the summary by name, with their units. Memory is the most of all attempts; bytes of live state are left out of a run
    that was resumed with no step left, as there were no gradients to count."""

    config: Mapping[str, Any]
    order: Mapping[str, Any]
    """What decides which rows are in which step."""

    log: RunLog | None
    """None without one."""

    @property
    def seconds(self) -> float | None:
        """Seconds of training, evaluations and checkpoints not included; None without a log."""
        return None if self.log is None else self.log.seconds


def state(place: Path) -> State:
    """How far the run in a directory is."""
    if not place.is_dir() or not any(place.iterdir()):
        return "none"
    file = place / RECORDS
    with suppress(DataError):  # cut short while it was written
        if file.is_file() and any(record.name == _LAST for record in records.read(file)):
            return "finished"
    return "saved" if any((path / "trainer_state.json").is_file() for path in place.glob("checkpoint-*")) else "begun"


def read(place: Path) -> Result:
    """What the finished run in a directory measured; of a resumed run the last summary counts.

    Raises:
        DataError: Its files are missing or malformed.
    """
    values: dict[str, tuple[float, str]] = {}
    losses: dict[float, float] = {}
    last: records.Record | None = None
    for record in records.read(place / RECORDS):
        if record.variant.endswith("planned"):
            continue
        if record.name == "held_out_loss":
            losses[record.x or 0.0] = record.value
        else:
            values[record.name] = (record.value, record.unit)
        last = record
    if last is None or _LAST not in values:
        raise DataError(f"{place}: holds no finished run")
    if "order" not in last.settings:
        raise DataError(f"{place}: does not say in what order its rows came, so that it cannot be compared")
    log = read_log(place / run_log.FILE_NAME)
    most = [point.value for point in log.series(_LAST)] if log is not None else []
    values[_LAST] = (max([*most, values[_LAST][0]]), values[_LAST][1])
    if values.get("live_bytes/gradients", (1.0, ""))[0] == 0:
        values = {name: value for name, value in values.items() if not name.startswith("live_bytes/")}
    skipped = int(values["skipped_steps"][0])
    steps = int(values["applied_steps"][0]) + skipped
    return Result(
        loss=losses.get(steps, math.inf) if steps else math.inf,
        loss_before=losses.get(0.0),
        steps=steps,
        skipped_steps=skipped,
        device=last.device,
        commit=last.commit,
        versions=last.versions,
        values=values,
        config=last.settings["config"],
        order=last.settings["order"],
        log=log,
    )


def read_log(file: Path) -> RunLog | None:
    """A run's log; None if there is no such file.

    Raises:
        DataError: A line is malformed.
    """
    return run_log.read(file) if file.is_file() else None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """How the rows of two runs differ, in words; none if the same rows are in the same steps."""
    sizes = rows_of_step(ours), rows_of_step(theirs)
    told = [
        "its training rows" if key == "data" else f"{key} {ours.get(key)!r}, not {theirs.get(key)!r}"
        for key in differing(ours, theirs)
        if key not in SIZES or sizes[0] == sizes[1]
    ]
    return told if sizes[0] == sizes[1] else [*told, f"{sizes[0]} rows of a rank in a step, not {sizes[1]}"]
