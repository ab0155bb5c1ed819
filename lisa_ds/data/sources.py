"""Finds data by its name: built in, a file, a directory, or a data set of the Hugging Face hub."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from lisa_ds.data import stdlib_docs
from lisa_ds.data.files import READERS, Row, read_rows, without_nulls
from lisa_ds.errors import DataError

_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?")
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Source:
    """Rows that can be read repeatedly, and a fingerprint that tells whether they are still the same."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[Row]] = field(repr=False)


def open_source(path: str, split: str, where: str) -> Source:
    """Find the rows of a split.

    Args:
        path: ``builtin:stdlib-docs``, a file, a directory, or a hub name; ``name:subset`` if it has subsets.
        split: Which split. A single file has one, ``train``.
        where: The config key that ``path`` comes from, for messages.

    Raises:
        DataError: There is no such data, or it has no such split.
    """
    if path.startswith("builtin:"):
        return _builtin(path, split, where)
    try:
        return _open(Path(path).expanduser(), path, split, where)
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such home, a NUL in it, no permission
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{where}: {path} cannot be read: {reason}") from None


def _open(local: Path, path: str, split: str, where: str) -> Source:
    if local.is_file():
        if split != "train":
            raise DataError(f"{where}: {path} is a single file and has no split {split!r}")
        return _files([local], path)
    if local.is_dir():
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            return _saved(local, split, where)
        return _files(_files_of_split(local, split, where), f"{path} ({split})")
    if local.suffix in READERS or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{where}: no such file or directory: {path} (looked from {Path.cwd()}){_near(local)}")
    return _hub(path, split, where)


def _builtin(path: str, split: str, where: str) -> Source:
    if path != "builtin:stdlib-docs":
        raise DataError(f"{where}: no such built-in data set: {path!r}; there is 'builtin:stdlib-docs'")
    if split not in stdlib_docs.SPLITS:
        raise DataError(f"{where}: {path} has the splits {' and '.join(stdlib_docs.SPLITS)}, got {split!r}")
    return _files([stdlib_docs.corpus() / f"{split}.jsonl"], f"{path} ({split})")


def _files(paths: list[Path], name: str) -> Source:
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix not in READERS:
            raise DataError(f"{path}: should be one of {', '.join(READERS)}, got {path.suffix or 'no suffix'}")
        digest.update(os.fsencode(path.name) + f"\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return Source(name, digest.hexdigest(), lambda: (row for path in paths for row in read_rows(path)))


def _files_of_split(directory: Path, split: str, where: str) -> list[Path]:
    """Files that carry the split's name, or whose folder does; for ``train``, else all that are not held out."""
    found = {path: path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.suffix in READERS}
    found = {path: inside for path, inside in found.items() if not any(p.startswith(".") for p in inside.parts)}
    if not found:
        raise DataError(f"{where}: no {', '.join(READERS)} file in {directory}")

    def named(split: str) -> list[Path]:
        name = re.compile(rf"{re.escape(split)}([-_.\d].*)?")
        return [path for path, inside in found.items() if any(name.fullmatch(part) for part in inside.parts)]

    chosen = named(split)
    if not chosen and split == "train":
        held_out = {path for name in _HELD_OUT for path in named(name)}
        chosen = [path for path in found if path not in held_out]
    if not chosen:
        names = ", ".join(str(inside) for inside in list(found.values())[:10])
        raise DataError(f"{where}: no file of split {split!r} in {directory}; found {names}")
    return chosen


def _saved(directory: Path, split: str, where: str) -> Source:
    try:
        loaded: Any = datasets.load_from_disk(str(directory))
    except Exception as error:  # of a missing, a truncated or a malformed file: each is another kind
        raise DataError(
            f"{where}: {directory} holds a saved data set that cannot be read: {' '.join(str(error).split())}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{where}: {directory} has the splits {', '.join(loaded)}, got {split!r}")
        loaded = loaded[split]
    elif split != "train":
        raise DataError(f"{where}: {directory} is a single saved data set and has no split {split!r}")
    return _from_datasets(loaded, f"{directory} ({split})")


def _hub(path: str, split: str, where: str) -> Source:
    match = _HUB_NAME.fullmatch(path)
    assert match is not None
    try:
        loaded = datasets.load_dataset(match["repository"], match["subset"], split=split)
    except Exception as error:  # of a dozen kinds, not all of them public
        raise DataError(
            f"{where}: no such file or directory: {path} (looked from {Path.cwd()}){_near(Path(path))}; "
            f"and the hub has no such data set either: {' '.join(str(error).split())}"
        ) from error
    return _from_datasets(loaded, f"{path} ({split})")


def _from_datasets(loaded: Any, name: str) -> Source:
    # A class is stored as a number, but means the name that somebody gave it.
    classes = {key: kind for key, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)}
    # Pictures and sounds are refused by name, not decoded: that takes packages that a text model does not need.
    stored = loaded.to_iterable_dataset().decode(False) if any(map(_is_media, loaded.features.values())) else loaded

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for number, fields in enumerate(stored, start=1):
                named = {key: kind.int2str(fields[key]) for key, kind in classes.items() if fields[key] is not None}
                yield Row(
                    f"{name}: row {number}", {key: without_nulls(value) for key, value in {**fields, **named}.items()}
                )
        except (ValueError, OverflowError, ImportError, pyarrow.ArrowException) as error:
            raise DataError(f"{name}: row {number + 1}: cannot be read: {' '.join(str(error).split())}") from error

    return Source(name, str(loaded._fingerprint), rows)


def _is_media(kind: Any) -> bool:
    if isinstance(kind, dict):
        return any(map(_is_media, kind.values()))
    inside = getattr(kind, "feature", None)  # of a list
    return _is_media(inside) if inside is not None else isinstance(getattr(kind, "decode", None), bool)


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent}"
    near = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
