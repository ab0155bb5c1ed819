"""Rows of a file, one reader for each suffix. Every row knows its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lisa_ds.errors import DataError

_PIECE = 2000  # characters: plain text is cut at blank lines into rows of about so many
_LONGEST_FIELD = 2**30  # of a csv file; Python's own limit is 128 KiB


@dataclass(frozen=True)
class Row:
    """One row as it was found.

    ``starts`` and ``ends`` are false where a plain text was cut into several rows.
    """

    place: str
    fields: Mapping[str, Any]
    starts: bool = True
    ends: bool = True


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one after the other; nothing but the row at hand is kept in memory, JSON arrays apart.

    Raises:
        DataError: The file cannot be read, or a line of it is malformed.
    """
    with _readable(path):
        yield from READERS[path.suffix](path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield _row(place, json.loads(text))
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from None


def _json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines under another name
            yield from _jsonl(path)
            return
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    for number, fields in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _row(f"{path}: row {number}", fields)


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", fields)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a valid parquet file: {error}") from None


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for fields in reader:
                place = f"{path}:{reader.line_num}"
                if None in fields or None in fields.values():
                    raise DataError(f"{place}: should have {len(reader.fieldnames or [])} fields, as the header does")
                yield Row(place, fields)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _text(path: Path) -> Iterator[Row]:
    # One document, in pieces: so a book can be tokenised in parallel, and a part of it held out.
    def row(end: bool) -> Row:
        return Row(f"{path}:{first}", {"text": piece}, starts=first == 1, ends=end)

    piece, first, complete = "", 1, False
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if complete and line.strip():  # a piece keeps the blank lines that follow it
                yield row(end=False)
                piece, first, complete = "", number, False
            piece += line
            complete = (len(piece) >= _PIECE and not line.strip()) or len(piece) >= 4 * _PIECE
    if piece.strip():
        yield row(end=True)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _csv,
}


def _row(place: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{place}: should be an object with columns, got {type(fields).__name__}")
    return Row(place, fields)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
