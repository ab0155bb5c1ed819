"""One measurement, one line of JSON. Benchmarks and runs write them, reports read them."""

from __future__ import annotations

import json
import logging
import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from lisa_ds.errors import DataError

T = TypeVar("T")

_log = logging.getLogger(__name__)

PACKAGES = ("torch", "deepspeed", "transformers", "triton")
"""The packages whose versions a measurement depends on."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and spread of repeated measurements."""

    value: float
    """Median."""

    low: float
    """20th percentile."""

    high: float
    """80th percentile."""

    n: int
    """Samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A measured number, with the hardware, commit, versions and settings it belongs to."""

    name: str
    """What was measured: ``switch_time``."""

    variant: str
    """Of which implementation or method: ``lisa``."""

    value: float
    """Median of the samples, or the number itself."""

    unit: str

    device: str
    """The hardware, in words: ``2 x NVIDIA H100``."""

    commit: str
    """Of this repository, see :func:`commit`."""

    versions: dict[str, str]
    """See :func:`versions`."""

    low: float | None = None
    """20th percentile of the samples."""

    high: float | None = None
    """80th percentile of the samples."""

    n: int = 1
    """Samples."""

    x: float | None = None
    """The swept quantity, if one was swept."""

    x_label: str = ""

    settings: dict[str, Any] = field(default_factory=dict)
    """What else it takes to measure it again: config, sizes, seed."""


def spread(samples: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile.

    Raises:
        ValueError: There are no samples, or one is not finite.

    Example:
        >>> spread([5.0, 1.0, 2.0, 3.0, 4.0])
        Spread(value=3.0, low=1.8, high=4.2, n=5)
    """
    if not samples or not all(math.isfinite(sample) for sample in samples):
        raise ValueError(f"spread takes finite samples, at least one, got {list(samples)}")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), low, high, len(samples))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of ``packages``, without importing them; those that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit this package runs from, with ``-dirty`` for a changed tree; ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed: a repository further up is somebody else's
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def append(path: str | Path, record: Record) -> None:
    """Add ``record`` to a file of records, which is created if need be.

    Raises:
        ValueError: A number is not finite, which JSON cannot hold. Nothing has been written.
    """
    line = json.dumps(asdict(record), allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line)


def read(path: str | Path) -> Iterator[Record]:
    """The records of a file, in order.

    Raises:
        DataError: The file is missing, or a line is not a record; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: no records can be read: {error.strerror}") from None
    known = {item.name for item in fields(Record)}
    for number, line in enumerate(lines, start=1):
        try:
            values: Mapping[str, Any] = json.loads(line)
            if unknown := set(values) - known:
                raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
            record = Record(**values)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: not a record: {error}") from None
        yield record


def growing(path: Path, parse: Callable[[Any], T], *, what: str, line: str) -> Iterator[tuple[int, T]]:
    """The lines of a file of JSON lines that a run appends to, each with its number.

    A last line that a killed run did not finish is skipped, with a notice.

    Args:
        path: The file.
        parse: Of the values of a line; raises ``ValueError`` or ``TypeError`` where they are malformed.
        what: What the file holds, in messages.
        line: What a line is, in messages.

    Raises:
        DataError: The file cannot be read, or a line is malformed; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: no {what} can be read: {error.strerror}") from None
    *lines, unfinished = text.split("\n")
    for number, told in enumerate(lines, start=1):
        try:
            yield number, parse(json.loads(told))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: no {line}: {error}") from None
    if unfinished:
        _log.warning("%s:%d: passing over a last line that was not finished", path, len(lines) + 1)


def cut_unfinished_line(path: Path) -> None:
    """Remove the unfinished last line of a file of lines: a killed run's, to which the next line would be joined.

    Raises:
        OSError: The file cannot be read or written.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            _log.warning("%s: removing a last line that was not finished", path)
            file.truncate(end)
