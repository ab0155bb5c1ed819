"""The file ``log.jsonl``: what a run's trainer logs, one line of JSON for each entry, with the seconds of training.

Note on the file.
    It is only appended to. A line is ``{"step", "epoch", "seconds", ...}`` and the entry as it was logged; a number that JSON
    cannot hold (the loss of a run that diverged) is null. Every start of a run adds a line of the same form whose only
    further key is ``begins``: what runs, see :class:`Start`; its step is the first that is taken. Lines from that step on that an
    earlier attempt has written are not part of the resumed run, so the reader drops them, whenever a run was killed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lisa_ds import records
from lisa_ds.errors import DataError

FILE_NAME = "log.jsonl"
"""Name of the file in a run's output directory."""

RECORDS, SAMPLES, PREEMPTED = "records.jsonl", "samples.jsonl", "preempted.json"
"""Names of other files there: the summary, answers before and after training, and what a run says that was preempted."""

PHASES = {"forward": "forward_s", "backward": "backward_s", "optimizer": "optimizer_s", "switch": "switch_s"}
"""Phases of a step, each with its key in entries: seconds of an optimizer step on rank 0, mean since the entry before."""

_PLACE = ("step", "epoch", "seconds")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a start or resume of a run says of it."""

    config: dict[str, Any]
    """The run's config, DeepSpeed's written out."""

    steps: int
    """The step at which the run ends, unless it is stopped early."""

    world_size: int
    device: str
    """The hardware, in words: ``2 x CPU``."""

    commit: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A value that was logged."""

    step: int
    seconds: float
    """Seconds of training up to then; evaluations and checkpoints are not in them."""

    value: float


@dataclass(frozen=True)
class RunLog:
    """The entries of a run, without those that a resume has dropped."""

    path: Path
    start: Start | None
    """The last start; None in a file that holds none."""

    begun_at: tuple[int, ...]
    """The steps taken before each attempt, in the order of the attempts."""

    entries: tuple[dict[str, Any], ...]
    """In order. Of two of one step, the later one holds where both have a key."""

    def series(self, key: str) -> list[Point]:
        """The numbers logged under ``key``, by step; those that are not finite are left out."""
        found: dict[int, Point] = {}
        for entry in self.entries:
            value = entry.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[entry["step"]] = Point(entry["step"], entry["seconds"], float(value))
        return [found[step] for step in sorted(found)]

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of a step, mean over the run, by phase; ``other`` is the rest of training: data, logging.

        Empty where entries do not tell phases apart.
        """
        forward = self.series(PHASES["forward"])
        if not forward:
            return {}
        sums: dict[str, float] = {}
        steps = 0
        for name, key in PHASES.items():
            points = self.series(key)
            begun = [max([at for at in self.begun_at if at < point.step], default=0) for point in points]
            before = [0, *(point.step for point in points)]
            spans = [point.step - max(at, last) for point, at, last in zip(points, begun, before, strict=False)]
            if points:
                sums[name] = sum(point.value * span for point, span in zip(points, spans, strict=True))
                steps = max(steps, sum(spans))
        means = {name: total / steps for name, total in sums.items()}
        means["other"] = max(0.0, forward[-1].seconds / forward[-1].step - sum(means.values()))
        return means

    @property
    def steps(self) -> int:
        """Steps taken, as far as entries tell."""
        return max((entry["step"] for entry in self.entries), default=0)

    @property
    def seconds(self) -> float:
        """Seconds of training, as far as entries tell."""
        return max((entry["seconds"] for entry in self.entries), default=0.0)


class Writer:
    """Appends to a run's file; only one rank has one.

    Args:
        path: The file; it and its directory are made if need be.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        records.cut_unfinished_line(path)

    def begin(self, step: int, epoch: float, seconds: float, start: Start) -> None:
        """Add what runs now.

        Args:
            step: Optimizer steps taken before.
            epoch: Epochs before, with a fraction.
            seconds: Seconds of training before.
            start: What runs.

        Raises:
            OSError: It cannot be written.
        """
        self.append(step + 1, epoch, seconds, {"begins": asdict(start)})

    def append(self, step: int, epoch: float, seconds: float, entry: Mapping[str, Any]) -> None:
        """Add an entry.

        Args:
            step: Optimizer steps taken.
            epoch: Epochs, with a fraction.
            seconds: Seconds of training since the run's start, those before a resume included.
            entry: As the trainer has logged it.

        Raises:
            OSError: It cannot be written.
        """
        place = {"step": step, "epoch": epoch, "seconds": round(seconds, 3)}
        line = {**place, **{key: value for key, value in entry.items() if key not in _PLACE}}
        text = json.dumps(_finite(line), allow_nan=False, default=_plain) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)


def read(path: str | Path) -> RunLog:
    """The entries of a run.

    A last line that a killed run did not finish is skipped, with a notice.

    Args:
        path: The file, or the run's output directory.

    Raises:
        DataError: There is no such file, it is empty, or a line is malformed; the message names the line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    start: Start | None = None
    begun_at: list[int] = []
    kept: list[dict[str, Any]] = []
    for number, line in records.growing(path, _parse, what="log", line="log entry"):
        step = line["step"]
        if "begins" not in line:
            if kept and step < kept[-1]["step"]:  # an attempt of which nothing says where it began
                kept = [entry for entry in kept if entry["step"] < step]
            kept.append(line)
            continue
        try:
            start = _start(line["begins"])
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: no start of a run: {error}") from None
        begun_at.append(step - 1)
        kept = [entry for entry in kept if entry["step"] < step and step > 1]  # at 1 it begins anew
    if start is None and not kept:
        raise DataError(f"{path}: is empty; a run writes its first line when it starts")
    return RunLog(path, start, tuple(begun_at), tuple(kept))


def _parse(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("not an object")
    step, seconds = values.get("step"), values.get("seconds")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step should be a whole number, 0 or more, got {step!r}")
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds should be a number, 0 or more, got {seconds!r}")
    return values


def _start(values: Any) -> Start:
    if not isinstance(values, dict):
        raise ValueError("begins should be an object")
    if unknown := set(values) - {item.name for item in fields(Start)}:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
    start = Start(**values)
    for name, kind in (("config", dict), ("versions", dict), ("steps", int), ("world_size", int)):
        if not isinstance(getattr(start, name), kind):
            raise ValueError(f"{name} should be {'an object' if kind is dict else 'a number'}")
    return start


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """A number of another library (a scalar of torch or numpy) as Python's; what is none, as text."""
    try:
        return _finite(value.item())
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return str(value)
