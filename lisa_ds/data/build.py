"""Builds token rows on disk, a batch at a time: memory does not grow with the data."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lisa_ds.data import formats
from lisa_ds.data.answers import Note
from lisa_ds.data.fields import Unused, listed
from lisa_ds.data.ignored import leave_out, leave_out_read
from lisa_ds.data.sources import Source
from lisa_ds.data.tokenise import Status, Tokeniser
from lisa_ds.errors import DataError
from lisa_ds.evidence import VERDICT

_BATCH = 1000  # rows in memory
_WORTH_A_PROCESS = 1000  # rows; starting a process takes as long as a thousand

_STRING = datasets.Value("string")
_TOKENS = datasets.Sequence(datasets.Value("int32"))
_TURNS = {"messages": _STRING, "tools": _STRING}  # as JSON: no two turns need hold the same
_CONTENT: dict[formats.Kind, dict[str, Any]] = {
    "conversation": _TURNS,
    "pair": _TURNS,
    "text": {"text": _STRING, "starts": datasets.Value("bool"), "ends": datasets.Value("bool")},
    "classification": {"text": _STRING, "label": _STRING},
}


@dataclass(frozen=True)
class Part:
    """Part of a source's rows: those whose hash lies in a range, of these perhaps a half, up to a number of them.

    Always those with the lowest hashes. Equal rows have equal hashes, and are never in both halves.
    """

    low: float = 0.0
    high: float = 1.0
    max_rows: int | None = None
    half: str | None = None
    """Of :data:`~lisa_ds.evidence.PARTS`; None for all."""

    def choose(self, hashes: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
        """Indices of the rows, ascending."""
        chosen = np.flatnonzero((hashes >= self.low) & (hashes < self.high))
        chosen = chosen[np.argsort(hashes[chosen], kind="stable")]
        if self.half is not None and len(chosen):
            middle = int(np.searchsorted(hashes[chosen], hashes[chosen[len(chosen) // 2]]))
            chosen = chosen[middle:] if self.half == VERDICT else chosen[:middle]
        return np.sort(chosen[: self.max_rows])


def build(
    target: Path,
    source: Source,
    part: Part,
    form: formats.Form,
    tokeniser: Tokeniser,
    *,
    columns: Mapping[str, str],
    ignore: Collection[str],
    seed: int,
    packed: bool,
    num_workers: int,
) -> None:
    """Write ``rows.arrow``, and ``counts.json``: what became of the rows, and which of their fields were not used.

    ``rows`` counts by the names of :class:`Status`, ``notes`` by those of :class:`Note`; ``unused`` holds ``columns`` and
    ``turns``; ``ignored`` counts what ``ignore`` left out.

    Raises:
        DataError: A row is malformed, or none is left.
    """
    scratch = target / "scratch.arrow"
    ignored = Counter(dict.fromkeys(ignore, 0))
    hashes, classes, unused = _write_rows(scratch, source, form, columns, ignored, seed)
    chosen = part.choose(hashes)
    if not len(chosen):
        if part.half is not None and (count := len(replace(part, half=None).choose(hashes))):
            raise DataError(
                f"{source.name}: data.eval_part {part.half!r} is left without a row, of {count} held out; hold out more rows "
                "that differ"
            )
        share = "data.eval_fraction holds out none" if part.low == 0 else "data.eval_fraction holds out each"
        raise DataError(f"{source.name}: {share} of its {len(hashes)} rows")
    if form.kind == "classification" and tokeniser.labels is None:
        tokeniser = replace(tokeniser, labels=_class_names(classes, source.name))

    rows = datasets.Dataset.from_file(str(scratch)).select(chosen)
    workers = min(num_workers, len(rows) // _WORTH_A_PROCESS)
    labels: Any = _TOKENS
    if form.kind == "classification":
        labels = datasets.ClassLabel(names=list(tokeniser.labels)) if tokeniser.labels else datasets.Value("int64")
    features = datasets.Features(input_ids=_TOKENS, labels=labels)
    with _bar_if_watched():
        tokens = rows.map(
            tokeniser,
            batched=True,
            batch_size=_BATCH // 10,
            remove_columns=rows.column_names,
            features=datasets.Features(**features, status=datasets.Value("int8"), notes=datasets.Value("int8")),
            num_proc=workers if workers > 1 else None,
            new_fingerprint=hashlib.sha256(str(target).encode()).hexdigest()[:32],  # of scratch: any will do
            desc=f"tokenising {source.name}",
        )

    counts: Counter[int] = Counter()
    notes: Counter[int] = Counter()
    batches = _kept(tokens, features.arrow_schema, counts, notes)
    _write(target / "rows.arrow", features, _packed(batches, tokeniser.max_length) if packed else batches)
    if not counts[Status.KEPT] + counts[Status.CUT]:
        why = {
            Status.NO_ANSWER: f"have nothing to learn within data.max_length {tokeniser.max_length}",
            Status.TOO_LONG: f"are longer than data.max_length {tokeniser.max_length}",
        }
        reasons = " and ".join(f"{counts[status]} {text}" for status, text in why.items() if counts[status])
        raise DataError(f"{source.name}: no row is left: {reasons}")
    became = {Status(key).name: number for key, number in counts.items()}
    noted = {str(note.name): sum(n for found, n in notes.items() if note & found) for note in Note}
    told = {"rows": became, "notes": noted, "unused": vars(unused), "ignored": ignored}
    (target / "counts.json").write_text(json.dumps(told))
    for file in target.glob("*.arrow"):
        if file.name != "rows.arrow":
            file.unlink()


@contextmanager
def _bar_if_watched() -> Iterator[None]:
    """Disable progress bars unless the output is a terminal: in a log file each update would be a line."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _write_rows(
    path: Path, source: Source, form: formats.Form, columns: Mapping[str, str], ignored: Counter[str], seed: int
) -> tuple[npt.NDArray[np.float64], set[int | str], Unused]:
    """Bring every row to its one form and hash it, so that equal rows are never in both parts of a split."""
    hashes, classes, unused, renamed, names = array("d"), set(), Unused(), set(), tuple(ignored)
    features = datasets.Features(**_CONTENT[form.kind], place=_STRING)

    def rows() -> Iterator[dict[str, Any]]:
        for row in source.rows():
            renamed.update(columns.keys() & row.fields.keys())
            try:
                row = leave_out(row, names, ignored)
                unused.columns.update(formats.hidden(row, columns))
                content = leave_out_read(form(formats.rename(row, columns), unused), names, ignored)
                said = {key: value for key, value in content.items() if value is not None}
                text = f"{seed}\0{json.dumps(said, sort_keys=True)}"
            except RecursionError:
                raise DataError(f"{row.place}: nested too deeply") from None
            hashes.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48)
            if form.kind == "classification":
                classes.add(content["label"])
                content = {**content, "label": json.dumps(content["label"])}
            elif form.kind == "text":
                content = {**content, "starts": row.starts, "ends": row.ends}
            else:
                content = {key: json.dumps(value) for key, value in content.items()}
            yield {**content, "place": row.place}

    stream, schema = rows(), features.arrow_schema
    batches = iter(lambda: list(islice(stream, _BATCH)), [])
    _write(path, features, (pa.Table.from_pylist(batch, schema=schema) for batch in batches))
    if absent := sorted(columns.keys() - renamed):
        raise DataError(f"{source.name}: data.columns renames {listed(absent)}, which no row has")
    return np.array(hashes), classes, unused


def _write(path: Path, features: datasets.Features, tables: Iterable[pa.Table]) -> None:
    schema = features.arrow_schema  # with the features in its metadata, where Dataset.from_file finds them
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))


def _kept(tokens: datasets.Dataset, schema: pa.Schema, counts: Counter[int], notes: Counter[int]) -> Iterator[pa.Table]:
    for table in tokens.with_format("arrow").iter(_BATCH):
        status = table["status"].to_numpy()
        counts.update(status.tolist())
        notes.update(table["notes"].to_pylist())
        yield table.filter(pa.array((status == Status.KEPT) | (status == Status.CUT))).select(schema.names)


def _packed(tables: Iterable[pa.Table], length: int) -> Iterator[pa.Table]:
    """Texts joined and cut into rows of ``length`` tokens; the last row is what remains."""
    rest = np.empty(0, dtype=np.int32)
    for table in tables:
        rest = np.concatenate([rest, *(chunk.flatten().to_numpy() for chunk in table["input_ids"].chunks)])
        full = len(rest) - len(rest) % length
        if full:
            yield _blocks(rest[:full], length)
            rest = rest[full:]
    if len(rest) > 1:  # a single token has nothing to predict
        yield _blocks(rest, len(rest))


def _blocks(flat: npt.NDArray[np.int32], length: int) -> pa.Table:
    edges = np.arange(0, len(flat) + 1, length, dtype=np.int32)
    blocks = pa.ListArray.from_arrays(edges, flat)
    return pa.table({"input_ids": blocks, "labels": blocks})


def _class_names(classes: set[int | str], name: str) -> tuple[str, ...]:
    """Names in order, or none if the classes are numbers from 0."""
    names = sorted(label for label in classes if isinstance(label, str))
    numbers = sorted(label for label in classes if isinstance(label, int))
    if names and numbers:
        raise DataError(f"{name}: label is a name in some rows ({names[0]!r}) and a number in others ({numbers[0]})")
    if numbers and numbers[0] < 0:
        raise DataError(f"{name}: label should be a name or a number from 0, got {numbers[0]}")
    return tuple(names)
