"""Files of JSON lines that people or models wrote the texts of: questions, prompts, answers, samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lisa_ds.errors import DataError


def text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None


def lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file that are not empty, each with its place, ``file:line``.

    A line ends at a line feed alone: the other characters that Unicode breaks lines at may stand inside a JSON text.

    Raises:
        DataError: It cannot be read.
    """
    numbered = enumerate(text(path).split("\n"), start=1)
    return [(f"{path}:{number}", line) for number, line in numbered if line.strip()]


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place, ``file:line``; empty lines are none.

    Raises:
        DataError: The file cannot be read, or a line is no object.
    """
    found = []
    for place, line in lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{place}: should be an object, got {type(value).__name__}")
        found.append((place, value))
    return found


def write(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of objects, which appears whole: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects), encoding="utf-8")
    os.replace(unfinished, path)
