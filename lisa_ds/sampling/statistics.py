"""The file ``layers.jsonl``: statistics of a run's layers, one line of JSON for each recording.

Note on the file.
    It is only appended to. Every start of a run adds a line that says what runs and from which step it resumes, and
    every recording adds a line. Earlier recordings of later steps are not part of the resumed run, so the reader drops
    them: nothing is counted twice, whenever a run was killed.

Units are named ``embeddings``, ``0`` ... (the blocks), ``lm_head`` and ``rest``; those without a weight of their own (a head that is
tied to the embeddings) are left out. Where matrices are drawn, they are numbered in place of blocks; the start has their names, and the
blocks' small parameters are ``block_rest``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lisa_ds import records
from lisa_ds.errors import DataError

FILE_NAME = "layers.jsonl"
"""Name of the file in a run's output directory."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start or resume of a run, with the settings that its recordings belong to."""

    step: int
    """Optimizer steps taken before."""

    method: str
    """``lisa``, ``full``, ``lora``."""

    model: str
    units: tuple[str, ...]
    """Names of the units, in the order they run."""

    tied: bool = False
    """Whether the head is the embeddings' weight."""

    matrices: tuple[str, ...] = ()
    """Names of the matrices, where these are drawn and numbered in place of blocks."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run: sampler, learning rate, precision, seed."""

    commit: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names (numbers) of the blocks or of what is drawn in their place, in order."""
        return tuple(unit for unit in self.units if unit.isdecimal())


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The units at one optimizer step. Norms are 2-norms over all weights of a unit together."""

    step: int
    """Optimizer steps taken, this one included."""

    interval: int
    """Index of the step's interval, from 0; without intervals, index of the recording."""

    weight_norm: dict[str, float | None]
    """After the step, by unit; None where it is not known or not finite. Under LoRA, of the weights with the adapters in them."""

    gradient_norm: dict[str, float | None]
    """By unit: root of the mean of the squared norm over the steps since the last recording in which the unit trained; None if
    it did not. Of the gradient before clipping."""

    update_norm: dict[str, float | None]
    """By unit: of what this step has added to the weights; None where it did not train, or the optimizer is not Adam."""

    sampled: tuple[str, ...]
    """Units that have trained since the last recording."""

    gradient_steps: int
    """Applied steps since the last recording, or since a resume."""

    visits: tuple[int, ...] | None = None
    """By block: intervals so far in which it trained; None without intervals."""

    probabilities: tuple[float, ...] | None = None
    """By block: its probability in the interval's draw; None where nothing is drawn."""


@dataclass(frozen=True)
class History:
    """The recordings of a run, without those that a resume has dropped."""

    path: Path
    start: Start
    """The last start."""

    recordings: tuple[Recording, ...]
    """By step, ascending."""

    def mean_weight_norm(self) -> dict[str, float]:
        """Mean of each unit's weight norm over the recordings; units without one are left out."""
        means = {}
        for unit in self.start.units:
            norms = [norm for line in self.recordings if (norm := line.weight_norm.get(unit)) is not None]
            if norms:
                means[unit] = math.fsum(norms) / len(norms)
        return means

    def visits(self) -> dict[str, int] | None:
        """Intervals in which each block trained, up to the last recording; None for a method without intervals."""
        counts = self.recordings[-1].visits if self.recordings else None
        return None if counts is None else dict(zip(self.start.blocks, counts, strict=True))


class Writer:
    """Appends to a run's file; only one rank has one.

    Args:
        path: The file; it and its directory are made if need be.
        start: What runs.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, start: Start) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        records.cut_unfinished_line(path)
        self._append("start", start)

    def append(self, recording: Recording) -> None:
        """Add a recording.

        Raises:
            OSError: It cannot be written.
            ValueError: A number is not finite, which JSON cannot hold.
        """
        self._append("recording", recording)

    def _append(self, kind: str, line: Start | Recording) -> None:
        text = json.dumps({"kind": kind, **asdict(line)}, allow_nan=False) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)


def read(path: str | Path) -> History:
    """The recordings of a run.

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
    kept: list[Recording] = []
    for number, line in records.growing(path, _parse, what="layer statistics", line="line of layer statistics"):
        if isinstance(line, Recording) and start is None:
            raise DataError(f"{path}:{number}: a recording before any start of a run")
        if isinstance(line, Recording):
            assert start is not None
            kept = [other for other in kept if other.step < line.step]
            _check_units(path, number, start, line)
            kept.append(line)
            continue
        kept = [other for other in kept if other.step <= line.step]
        if kept and start is not None and line.units != start.units:
            raise DataError(
                f"{path}:{number}: goes on from step {line.step} with other units than before: {len(line.units)} instead of "
                f"{len(start.units)}; the runs of two models have been written to one file"
            )
        start = line
    if start is None:
        raise DataError(f"{path}: is empty; a run writes its first line when it starts")
    return History(path, start, tuple(kept))


def finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The same with None for values that JSON cannot hold: norms of a run that diverged."""
    return {unit: value if value is not None and math.isfinite(value) else None for unit, value in values.items()}


def count_visits(blocks: int, history: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """For each of ``blocks``, the number of sets in ``history`` that contain it.

    Example:
        >>> count_visits(3, [(0, 2), (2,)])
        (1, 0, 2)
    """
    counts = [0] * blocks
    for layers in history:
        for layer in layers:
            counts[layer] += 1
    return tuple(counts)


def _parse(values: Any) -> Start | Recording:
    if not isinstance(values, dict):
        raise ValueError("not an object")
    kind = {"start": Start, "recording": Recording}.get(values.pop("kind", None))
    if kind is None:
        raise ValueError("kind should be 'start' or 'recording'")
    if unknown := set(values) - {item.name for item in fields(kind)}:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
    for name in ("units", "matrices", "sampled", "visits", "probabilities"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    line: Start | Recording = kind(**values)
    if not isinstance(line.step, int):
        raise ValueError(f"step should be a whole number, got {line.step!r}")
    if isinstance(line, Recording):
        for name in ("weight_norm", "gradient_norm", "update_norm"):
            _check_norms(name, getattr(line, name))
    return line


def _check_norms(name: str, norms: Any) -> None:
    if not isinstance(norms, dict):
        raise ValueError(f"{name} should be an object, by unit")
    for unit, norm in norms.items():
        if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float))):
            raise ValueError(f"{name} of {unit} should be a number, got {norm!r}")


def _check_units(path: Path, number: int, start: Start, line: Recording) -> None:
    if unknown := [unit for unit in (*line.weight_norm, *line.sampled) if unit not in start.units]:
        raise DataError(f"{path}:{number}: unit {unknown[0]!r} is not among the run's, which its start names")
    for name in ("visits", "probabilities"):
        values = getattr(line, name)
        if values is not None and len(values) != len(start.blocks):
            raise DataError(f"{path}:{number}: {name}: got {len(values)} values for {len(start.blocks)} blocks")
