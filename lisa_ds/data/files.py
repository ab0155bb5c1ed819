"""Rows of a file, one reader for each suffix. Every row knows its file and line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lisa_ds.data import strict_json
from lisa_ds.data.strict_json import NotJSON
from lisa_ds.errors import DataError

_PIECE = 2000  # characters: plain text is cut at blank lines into rows of about so many
_BATCH = 1000  # rows of a parquet file in memory
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
            place = f"{shown(path)}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                fields = strict_json.parse(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from None
            except NotJSON as error:
                column = "" if error.position is None else f" (column {error.position + 1})"
                raise DataError(f"{place}: not valid JSON: {error}{column}") from None
            if text.strip():
                yield _row(place, fields)


def _json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = strict_json.parse(text) if text.strip() else []
    except NotJSON as error:
        if str(error) == "Extra data" and text.lstrip().startswith("{"):  # JSON lines under another name
            yield from _jsonl(path)
            return
        if error.position is None:
            raise DataError(f"{shown(path)}: not valid JSON: {error}") from None
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        raise DataError(f"{shown(path)}:{line}: not valid JSON: {error} (column {column})") from None
    for number, fields in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _row(f"{shown(path)}: row {number}", fields)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_twice(names, f"{shown(path)}: the schema")
            batches = file.iter_batches(batch_size=_BATCH)
            yield from (
                Row(f"{shown(path)}: row {number}", fields)
                for number, fields in enumerate(chain.from_iterable(map(_arrow_rows, batches)), start=1)
            )
    except pyarrow.ArrowException as error:
        raise DataError(f"{shown(path)}: not a valid parquet file: {' '.join(str(error).split())}") from None
    except _Unreadable as error:
        raise DataError(f"{shown(path)}: {error}") from None


class _Unreadable(Exception):
    """A column holds a value that Python cannot represent: the message names it."""


def _arrow_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch. All objects of a column have the same keys in Arrow, so that most are null in most rows."""
    columns = {}
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = [without_nulls(value) for value in values.to_pylist()]
        except (
            ValueError,
            OverflowError,
            ImportError,
            LookupError,
        ) as error:  # a year of 20000, no UTF-8, no such time zone
            raise _Unreadable(f"column {name!r} cannot be read: {' '.join(str(error).split())}") from None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects that hold null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            _refuse_twice(reader.fieldnames or (), f"{shown(path)}:{reader.line_num}: the header")
            for fields in reader:
                place = f"{shown(path)}:{reader.line_num}"
                if None in fields or None in fields.values():
                    raise DataError(f"{place}: should have {len(reader.fieldnames or [])} fields, as the header does")
                yield Row(place, fields)
        except csv.Error as error:
            raise DataError(f"{shown(path)}:{reader.line_num}: not valid CSV: {error}") from None


def _text(path: Path) -> Iterator[Row]:
    # One document, in pieces: so a book can be tokenised in parallel, and a part of it held out.
    def row(end: bool) -> Row:
        return Row(f"{shown(path)}:{first}", {"text": piece}, starts=first == 1, ends=end)

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


def _refuse_twice(names: Sequence[str], where: str) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{where} has the column {twice[0]!r} twice")


def shown(path: Path) -> str:
    """The path as text that can be printed and stored, even if its name is not UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}{_undecodable(path, error)}") from None
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror or error}") from None


def _undecodable(path: Path, error: UnicodeDecodeError) -> str:
    """Line and byte of what is not UTF-8: the error itself counts from the start of a block of the file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                return f":{number}: not UTF-8 ({found.reason} at byte {found.start + 1} of the line)"
    return f": not UTF-8 ({error.reason})"
