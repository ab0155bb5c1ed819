"""A comparison as its file of records tells it; no run's directory is needed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisa_ds import records
from lisa_ds.errors import DataError
from lisa_ds.evidence import Gap, pairs
from lisa_ds.memory import SAMPLED_KINDS
from lisa_ds.records import Record

PEAK = "max_rank_memory_gb"


@dataclass
class Run:
    """What one run measured."""

    arm: str
    stage: str
    seed: int
    rate: float
    steps: int = 0
    diverged: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    curve: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    """Held-out loss, and seconds of training until then where they are known, by step."""

    values: dict[str, float] = field(default_factory=dict)
    """Other numbers by the names of their records."""

    @property
    def loss(self) -> float | None:
        """Held-out loss after training; None where it diverged."""
        return None if self.diverged or self.steps not in self.curve else self.curve[self.steps][0]

    @property
    def state(self) -> float | None:
        """Bytes of gradients and optimizer state on a rank."""
        kinds = [self.values[f"live_bytes/{kind}"] for kind in SAMPLED_KINDS if f"live_bytes/{kind}" in self.values]
        return sum(kinds) if kinds else None

    @property
    def with_weights(self) -> float | None:
        """The same and the weights: a method whose weights are its fp32 copy (``galore.master_weights``) has that copy here alone."""
        weights = self.values.get("live_bytes/weights")
        return None if weights is None or self.state is None else weights + self.state

    @property
    def seconds_per_step(self) -> float | None:
        """Of training."""
        seconds = self.values.get("training_seconds")
        return seconds / self.steps if seconds is not None and self.steps else None


@dataclass(frozen=True)
class Comparison:
    """All runs, and what was asked for."""

    about: Record
    """The record ``comparison``."""

    planned: Mapping[str, Mapping[str, float]]
    """By arm, the planner's ``peak``, ``state`` and ``weights``, bytes."""

    runs: Sequence[Run]
    devices: Sequence[str]
    commits: Sequence[str]

    @property
    def arms(self) -> list[str]:
        """Names, in the order in which they were asked for."""
        return list(self.about.settings["arms"])

    @property
    def reference(self) -> str:
        """The arm that others are compared with."""
        return str(self.about.settings["reference"])

    @property
    def others(self) -> list[str]:
        """All arms but the reference."""
        return [arm for arm in self.arms if arm != self.reference]

    def of(self, arm: str, stage: str = "verdict") -> list[Run]:
        """The runs of an arm in a stage."""
        return [run for run in self.runs if (run.arm, run.stage) == (arm, stage)]

    def losses(self, arm: str) -> dict[int, float]:
        """Verdict losses of an arm by seed; runs that diverged are left out."""
        return {run.seed: run.loss for run in self.of(arm) if run.loss is not None}

    def gap(self, arm: str) -> Gap | None:
        """Verdict loss of an arm minus the reference's, at the seeds that both have."""
        return pairs(self.losses(arm), self.losses(self.reference))

    @property
    def before(self) -> float | None:
        """Held-out loss of the model before training, on the verdict's rows."""
        return next((run.curve[0][0] for run in self.runs if run.stage == "verdict" and 0 in run.curve), None)

    def diverged(self, arm: str) -> int:
        """How many runs of the verdict diverged: they are in no mean and no pair."""
        return sum(run.diverged for run in self.of(arm))

    def mean(self, arm: str, name: str) -> float | None:
        """The mean of a number over an arm's runs of the verdict."""
        return mean(run.values.get(name) for run in self.of(arm))


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are there."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def about(file: Path) -> Record:
    """The record that says what was compared.

    Raises:
        DataError: The file is not a comparison's.
    """
    first = next(records.read(file), None)
    if first is None or first.name != "comparison":
        raise DataError(f"{file}: should begin with a record 'comparison', as `lisa-ds compare` writes it")
    return first


def load(file: Path) -> Comparison:
    """Read a comparison.

    Raises:
        DataError: The file is missing, or is not a comparison's.
    """
    head = about(file)
    planned: dict[str, dict[str, float]] = {}
    runs: dict[str, Run] = {}
    devices: dict[str, None] = {}
    commits: dict[str, None] = {}
    for record in list(records.read(file))[1:]:
        if record.name.startswith("planned_bytes/"):
            planned.setdefault(record.variant, {})[record.name.partition("/")[2]] = record.value
            continue
        settings = record.settings
        run = runs.setdefault(
            settings["run"], Run(record.variant, settings["stage"], settings["seed"], settings["rate"])
        )
        devices[record.device] = commits[record.commit] = None
        if record.name == "steps":
            run.steps, run.diverged, run.config = int(record.value), settings["diverged"], settings["config"]
        elif record.name == "held_out_loss":
            run.curve[int(record.x or 0)] = (record.value, settings.get("seconds"))
        else:
            run.values[record.name] = record.value
    return Comparison(head, planned, list(runs.values()), list(devices), list(commits))
