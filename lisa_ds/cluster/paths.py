"""Whether hosts can write where a run writes, see one another's files there, and read the same model and data."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lisa_ds.cache import cache_dir
from lisa_ds.cluster.findings import Finding, named
from lisa_ds.config import RunConfig

PATIENCE_S = 5.0
"""Seconds that a host waits at most for another's file to appear: network file systems cache."""

_FILES_OPENED = 100
_DATA_SUFFIXES = {".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt"}
_SHARE = "mount it at that path on all hosts, or choose a folder on a shared file system"


@dataclass(frozen=True)
class Targets:
    """The files and folders that a run reads and writes, by purpose."""

    shared: dict[str, Path] = field(default_factory=dict)
    """Folders that all hosts write to together."""

    own: dict[str, Path] = field(default_factory=dict)
    """Folders that a host may have to itself."""

    read: dict[str, Path] = field(default_factory=dict)
    may_be_elsewhere: frozenset[str] = frozenset()
    """Keys of ``read`` whose value may be a name on the hub instead of a path."""

    @property
    def written(self) -> dict[str, Path]:
        """All folders that are written to."""
        return {**self.shared, **self.own}


def targets(config: RunConfig | None) -> Targets:
    """The targets of a run; without a run, the cache alone."""
    own = {"cache": cache_dir()}
    if config is None:
        return Targets(own=own)
    data = {"data": config.data.path, "held-out data": config.data.eval_path or ""}
    names = {"model": config.model.name_or_path, **data}
    names = {name: text for name, text in names.items() if text and not text.startswith("builtin:")}
    return Targets(
        shared={"output_dir": config.output_dir()},
        own=own,
        read={name: Path(text).expanduser() for name, text in names.items()},
        may_be_elsewhere=frozenset(name for name, text in names.items() if _may_be_hub_name(text)),
    )


class Tokens:
    """On rank 0: a file in each folder for the others to find. What was made is removed again."""

    def __init__(self, folders: Mapping[str, Path], token: str) -> None:
        self.problems: dict[str, str] = {}
        """Folders that cannot be written to, each with the reason."""
        self._made: list[Path] = []
        for name, folder in folders.items():
            new = [above for above in (folder, *folder.parents) if not above.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._made += new
                _token(folder, token).write_text(token)
                self._made.insert(0, _token(folder, token))
            except OSError as error:
                self.problems[name] = _cannot_write(folder, error)
                self._made += [path for path in new if path not in self._made]

    def remove(self) -> None:
        """Remove every file and folder that was made."""
        for path in self._made:
            with suppress(OSError):  # it is gone, or a run has begun to use it
                path.rmdir() if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class Seen:
    """What one host says of the folders and files."""

    unshared: list[str]
    unwritable: dict[str, str]
    marks: dict[str, str]
    """For each thing that is read: ``missing``, or ``!`` and why it cannot be read, or a fingerprint of its files."""

    disk_free: dict[str, int]
    """Bytes on the file systems of the folders."""


def look(targets: Targets, token: str, lost: Mapping[str, str], rank: int, patience: float = PATIENCE_S) -> Seen:
    """What this host sees. It must look here for the first time: a network file system caches that a file was missing.

    Args:
        targets: The folders and files.
        token: What rank 0 has written.
        lost: Folders where rank 0 could not write.
        rank: This rank, whose own file is removed again.
        patience: Seconds to wait for rank 0's files.
    """
    unshared, unwritable = [], {}
    deadline = time.monotonic() + patience
    for name, folder in targets.written.items():
        if name not in lost:
            while not (shared := _reads(folder, token)) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not shared:
                unshared.append(name)
        if problem := _unwritable(folder, f"{token}-{rank}"):
            unwritable[name] = problem
    return Seen(
        unshared,
        unwritable,
        marks={name: _mark(path) for name, path in targets.read.items()},
        disk_free={name: shutil.disk_usage(_nearest(folder)).free for name, folder in targets.written.items()},
    )


def findings(targets: Targets, seen: Mapping[str, Seen], lost: Mapping[str, str], first: str) -> list[Finding]:
    """Findings about these files and folders.

    Args:
        targets: The folders and files.
        seen: What each host said; that of rank 0 comes first.
        lost: Folders where rank 0 could not write, and why.
        first: The host of rank 0.
    """
    found = [Finding(first, f"{name}: {why}", "correct the path, or its permissions") for name, why in lost.items()]
    for host, one in seen.items():
        found += [
            Finding(host, f"{name}: {why}", "correct the path, or its permissions")
            for name, why in one.unwritable.items()
            if host != first or name not in lost
        ]
        for name in one.unshared:
            what = f"{name}: {targets.written[name]} does not show what {first} has written there"
            if name in targets.own:
                remedy = "every host will build its own, or mount it on all hosts"
                found.append(Finding(host, what, remedy, is_error=False))
            else:
                found.append(Finding(host, what, _SHARE))
    for name, path in targets.read.items():
        found += _readable(name, path, {host: one.marks[name] for host, one in seen.items()}, targets)
    return found


def _readable(name: str, path: Path, marks: Mapping[str, str], targets: Targets) -> list[Finding]:
    missing = [host for host, mark in marks.items() if mark == "missing"]
    if len(missing) == len(marks) and name in targets.may_be_elsewhere:
        return []
    found = [Finding(host, f"{name}: {path} does not exist", _SHARE) for host in missing]
    for host, mark in marks.items():
        if mark.startswith("!"):
            found.append(Finding(host, f"{name}: {path} cannot be read ({mark[1:]})", "correct its permissions"))
    good = {host: mark for host, mark in marks.items() if mark != "missing" and not mark.startswith("!")}
    usual = next(iter(good.values()), None)
    agreeing = named([host for host, mark in good.items() if mark == usual])
    return found + [
        Finding(host, f"{name}: {path} holds other files than on {agreeing}", "copy it again, or mount one for all")
        for host, mark in good.items()
        if mark != usual
    ]


def _may_be_hub_name(text: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) is not None and Path(text).suffix not in _DATA_SUFFIXES


def _nearest(path: Path) -> Path:
    """``path``, or the nearest above it that exists."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())


def _token(folder: Path, token: str) -> Path:
    return folder / f".lisa-ds-check-{token}"


def _reads(folder: Path, token: str) -> bool:
    try:
        return _token(folder, token).read_text() == token
    except OSError:
        return False


def _unwritable(folder: Path, token: str) -> str | None:
    if not folder.is_dir():  # rank 0 made none here: would this host be allowed to?
        above = _nearest(folder)
        if not above.is_dir():
            return f"{folder} cannot be made: {above} is a file"
        return None if os.access(above, os.W_OK | os.X_OK) else f"{folder} cannot be made in {above}"
    mine = _token(folder, token)
    try:
        mine.write_text(token)
    except OSError as error:
        return _cannot_write(folder, error)
    finally:
        with suppress(OSError):
            mine.unlink()
    return None


def _cannot_write(folder: Path, error: OSError) -> str:
    above = _nearest(folder)
    if not above.is_dir():
        return f"{folder} cannot be made: {above} is a file"
    return f"{folder} cannot be written to ({error.strerror})"


def _mark(path: Path) -> str:
    """Fingerprint of files by names and sizes; also opens them. Reading all bytes would take as long as loading."""
    try:
        if not path.exists():
            return "missing"
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
        for file in files[:_FILES_OPENED]:
            with file.open("rb") as content:
                content.read(1)
    except OSError as error:
        return f"!{error.filename}: {error.strerror}"
    return digest.hexdigest()
