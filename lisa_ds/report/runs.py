"""What a run's directory holds, read for a report; parts that are missing are named and left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lisa_ds import jsonl, records, run_log
from lisa_ds.errors import ConfigError, DataError
from lisa_ds.records import Record
from lisa_ds.run_log import PREEMPTED, RECORDS, SAMPLES, RunLog
from lisa_ds.sampling import statistics
from lisa_ds.sampling.statistics import History

COMPARISON = ("comparison.jsonl", "comparison.md")
"""Files by which the directory of a comparison is known; its runs are somewhere below ``runs``."""

# What differs between runs that are the same but for chance.
_BY_CHANCE = {
    "training.seed",
    "training.data_seed",
    "training.output_dir",
    "training.run_name",
    "lisa.seed",
    "data.seed",
}


@dataclass(frozen=True)
class Sample:
    """What a model answers to a prompt."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Run:
    """A run, as far as its directory tells."""

    directory: Path
    label: str
    """Unique among the runs of a report."""

    log: RunLog | None
    records: tuple[Record, ...]
    """The last of each name, variant and x."""

    history: History | None
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = field(default=())
    """What is missing or cannot be read, in words."""

    @property
    def config(self) -> dict[str, Any] | None:
        """The run's config as plain values."""
        if self.log is not None and self.log.start is not None:
            return self.log.start.config
        found = next((record.settings.get("config") for record in self.records), None)
        return found if isinstance(found, dict) else None

    @property
    def method(self) -> str:
        """``lisa``, ``full`` ..."""
        if self.config is not None:
            return str(self.config.get("method", "unknown"))
        return self.history.start.method if self.history is not None else "unknown"

    @property
    def model(self) -> str:
        """The model's name."""
        named = _at(self.config, "model", "name_or_path")
        return str(named or (self.history.start.model if self.history is not None else "unknown"))

    @property
    def data(self) -> str:
        """The data's name."""
        return str(_at(self.config, "data", "path") or "unknown")

    @property
    def world_size(self) -> int | None:
        """Ranks; None if it is not known."""
        return None if self.log is None or self.log.start is None else self.log.start.world_size

    @property
    def device(self) -> str | None:
        """The hardware, in words."""
        if self.log is not None and self.log.start is not None:
            return self.log.start.device
        return next((record.device for record in self.records), None)

    @property
    def made_by(self) -> tuple[str, dict[str, str]]:
        """Commit and versions."""
        start = self.log.start if self.log is not None else None
        source = start or next(iter(self.records), None) or (self.history.start if self.history is not None else None)
        return ("unknown", {}) if source is None else (source.commit, source.versions)

    @property
    def losses(self) -> tuple[float | None, float | None]:
        """Held-out loss before training, and the last one measured."""
        points = self.log.series("eval_loss") if self.log is not None else []
        recorded = {record.x: record.value for record in self.records if record.name == "held_out_loss"}
        before = next((point.value for point in points if point.step == 0), recorded.get(0))
        after = points[-1].value if points and points[-1].step else None
        finished = [value for x, value in recorded.items() if x]  # of the model that was kept
        return before, finished[-1] if finished else after

    @property
    def steps(self) -> int | None:
        """Optimizer steps taken."""
        if self.log is not None and self.log.entries:
            return self.log.steps
        return self.history.recordings[-1].step if self.history is not None and self.history.recordings else None

    @property
    def tokens(self) -> float | None:
        """Tokens trained on by all ranks, padding not counted; from rates, and so rounded."""
        rates = self.log.series("tokens_per_second") if self.log is not None else []
        if not rates or self.log is None:
            return None
        since = [0.0, *(point.seconds for point in rates)]
        return sum(point.value * (end - begin) for point, (begin, end) in zip(rates, pairwise(since), strict=True))

    @property
    def memory(self) -> float | None:
        """The most bytes that a rank has had; of its process where there is no GPU."""
        logged = [point.value for point in self.log.series("max_rank_memory_gb")] if self.log is not None else []
        recorded = [record.value for record in self.records if record.name == "max_rank_memory_gb"]
        return 1e9 * max(logged or recorded) if logged or recorded else None

    @property
    def live(self) -> dict[str, float]:
        """Bytes of live model state on a rank by kind, measured in the last interval."""
        found = [record for record in self.records if record.variant == self.method]
        return {
            record.name.removeprefix("live_bytes/"): record.value
            for record in found
            if record.name.startswith("live_bytes/")
        }

    @property
    def state(self) -> str:
        """Whether the run is over, in words."""
        if self.records:
            return "finished"
        where = "" if self.steps is None else f" after step {self.steps}"
        if where and self.log is not None and self.log.start is not None:
            where += f" of {self.log.start.steps}"
        return (
            f"preempted{where}" if (self.directory / PREEMPTED).exists() else f"not finished: running or ended{where}"
        )

    def seconds_by_phase(self) -> dict[str, float]:
        """See :meth:`RunLog.seconds_by_phase`; empty without a log."""
        return {} if self.log is None else self.log.seconds_by_phase()


def is_run(directory: Path) -> bool:
    """Whether a directory is a run's."""
    return any((directory / name).is_file() for name in (run_log.FILE_NAME, RECORDS, statistics.FILE_NAME))


def is_comparison(directory: Path) -> bool:
    """Whether a directory is a comparison's."""
    return any((directory / name).is_file() for name in COMPARISON)


def below(directory: Path) -> list[Path]:
    """The runs of a comparison."""
    return sorted(path for path in (directory / "runs").rglob("*") if path.is_dir() and is_run(path))


def load(directories: Sequence[Path]) -> list[Run]:
    """Runs, each under a label of its own.

    Raises:
        ConfigError: A directory is no run.
    """
    for directory in directories:
        if not is_run(directory):
            what = "there is no such directory" if not directory.is_dir() else (
                f"holds neither {run_log.FILE_NAME} nor {RECORDS} nor {statistics.FILE_NAME}, so it is no run, and no "
                f"{COMPARISON[0]}, so it is no comparison"
            )  # fmt: skip
            raise ConfigError(f"report: {directory}: {what}")
    labels = _labels([directory.absolute() for directory in directories])
    return [_load(directory, label) for directory, label in zip(directories, labels, strict=True)]


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ by seed alone, together, under the method's name and what sets them apart from others of the method."""
    found: list[tuple[dict[str, str], list[Run]]] = []
    for run in runs:
        settings = _flat(run.config) if run.config is not None else {"run": run.label}
        kept = {key: value for key, value in settings.items() if key not in _BY_CHANCE}
        same = next((members for fields, members in found if fields == kept), None)
        if same is None:
            found.append((kept, [run]))
        else:
            same.append(run)
    named: dict[str, list[Run]] = {}
    for fields, members in found:
        rivals = [other for other, theirs in found if theirs[0].method == members[0].method]
        differing = [key for key in fields if len({other.get(key, "") for other in rivals}) > 1]
        apart = ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {fields[key]}" for key in differing)
        name = f"{members[0].method}: {apart}" if apart else members[0].method
        named[name if name not in named else f"{name} [{len(named)}]"] = members
    return named


def _load(directory: Path, label: str) -> Run:
    notes: list[str] = []
    log = history = None
    found: dict[tuple[str, str, float | None], Record] = {}
    samples: list[Sample] = []
    if not (directory / run_log.FILE_NAME).exists():
        notes.append(f"There is no {run_log.FILE_NAME}, so there are no curves.")
    else:
        try:
            log = run_log.read(directory)
        except DataError as error:
            notes.append(f"No curves: {error}.")
    if not (directory / statistics.FILE_NAME).exists():
        notes.append(f"There is no {statistics.FILE_NAME} (statistics: off), so layers are not shown.")
    else:
        try:
            history = statistics.read(directory)
        except DataError as error:
            notes.append(f"Layers are not shown: {error}.")
    if (directory / RECORDS).exists():
        try:
            for record in records.read(directory / RECORDS):
                found[record.name, record.variant, record.x] = record
        except DataError as error:
            notes.append(f"No summary: {error}.")
    if (directory / SAMPLES).exists():
        try:
            samples = list(_samples(directory / SAMPLES))
        except DataError as error:
            notes.append(f"No samples: {error}.")
    return Run(directory, label, log, tuple(found.values()), history, tuple(samples), tuple(notes))


def _samples(path: Path) -> Iterable[Sample]:
    for place, values in jsonl.read(path):
        if not isinstance(values.get("prompt"), str):
            raise DataError(f"{place}: no sample: should be an object with prompt, before and after")
        answers = [values.get(name) for name in ("before", "after")]
        before, after = (None if answer is None else str(answer) for answer in answers)
        yield Sample(values["prompt"], before, after)


def _labels(directories: Sequence[Path]) -> list[str]:
    """As much of each path as makes it unique."""
    for depth in range(1, 1 + max((len(path.parts) for path in directories), default=0)):
        names = ["/".join(path.parts[-depth:]) for path in directories]
        if len(set(names)) == len(names):
            return names
    return [f"{path} [{i}]" for i, path in enumerate(directories, start=1)]  # one of them twice


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
