"""Whatever a data file holds: rows of tokens, or a mistake with its place; no traceback, and nothing half-written."""

from __future__ import annotations

import copy
import csv
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset
from lisa_ds.errors import LisaError
from tests.data.rows import tokenizer

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS: list[dict[str, Any]] = [
    {"instruction": "q", "input": "i", "output": "a", "history": [["b", "c"]], "system": "s"},
    {"messages": [{"role": "system", "content": "s"}, ASK, {**ANSWER, "weight": 1, "reasoning_content": "hm"}]},
    {
        "messages": [
            ASK,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "name": "f", "content": "1"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
    },
    {"prompt": "q", "completion": "a"},
    {"prompt": [ASK], "completion": [ANSWER]},
    {"text": "some text"},
    {"text": "some text", "label": "good"},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
]
# What some tool gives a meaning to, here or elsewhere.
NAMES = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "text",
    "label",
    "labels",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "functions",
    "images",
    "image",
    "weight",
    "score",
    "reward",
    "chosen",
    "rejected",
    "kto_tag",
    "segments",
    "input_ids",
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    "reasoning_content",
    "thinking",
    "train",
    "loss",
    "refusal",
    "type",
    "function",
    "arguments",
    "id",
    "context",
    "system_prompt",
    "x",
]
HUGE, DEEP = "HUGE", "DEEP"  # stand for what json.dumps does not write
VALUES = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, 1, -1, 0.5, float("nan"), float("inf"), 10**30, HUGE, DEEP),
            *("", " ", "\n", "a", "<image>", "\ud83d", "\x00", "\ufeff", "{", "[]", "null", '{"name": "f"}', '"', "é" * 50),
            *("user", "assistant", "function_call", "<think>hm</think>", "<|end|>", "{{ x }}", "{% generation %}"),
            *([], {}, [None], [[]], ["a"], [["a", "b"]], {"a": None}, {"": 1}, [ASK], [ASK, ANSWER], [CALL], CALL),
        ]
    ),
    st.text(max_size=6),
    st.integers(),
    st.recursive(st.none() | st.booleans() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5),
)  # fmt: skip


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Rows of some form, most of them changed in a few places."""
    base = draw(st.sampled_from(ROWS))
    found: list[Any] = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 2, 3]))):
        row = copy.deepcopy(draw(st.sampled_from([base, base, base, draw(st.sampled_from(ROWS))])))
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
            change(draw, row)
        found.append(row)
    if draw(st.integers(0, 9)) == 0:
        found.append(draw(VALUES))
    return found


def change(draw: st.DrawFn, row: dict[str, Any]) -> None:
    """Put in, take out, or replace something somewhere in a row."""
    place: Any = row
    while draw(st.booleans()):
        inner = [
            value for value in (place.values() if isinstance(place, dict) else place) if isinstance(value, (dict, list))
        ]
        if not inner:
            break
        place = draw(st.sampled_from(inner))
    value = copy.deepcopy(draw(VALUES))
    if isinstance(place, dict):
        key = draw(st.sampled_from([*place, *NAMES]) | st.text(max_size=4))
        if draw(st.integers(0, 3)):
            place[key] = value
        else:
            place.pop(key, None)
    elif place and draw(st.booleans()):
        place[draw(st.integers(0, len(place) - 1))] = value
    else:
        place.append(value)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A suffix and what a file of that name holds."""
    found = draw(rows())
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]))
    content = encoded(suffix, found)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 8)))
        put = draw(
            st.sampled_from([b"", b"\n", b"\xff", b"\x00", b'"', b"{", b"]", b",", b"\\", b"\xef\xbb\xbf"])
            | st.binary(max_size=4)
        )
        content = draw(
            st.sampled_from([content[:at] + put + content[end:], content[:at], content[:end] + content[at:]])
        )
    return suffix, content


def encoded(suffix: str, found: list[Any]) -> bytes:
    if suffix == ".parquet":
        sink = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pa.Table.from_pylist(found), sink)
        except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):  # nothing that Arrow can hold
            pyarrow.parquet.write_table(pa.table({"text": ["a"]}), sink)
        return sink.getvalue()
    if suffix in (".csv", ".tsv"):
        sheet = io.StringIO()
        objects = [row for row in found if isinstance(row, dict)]
        writer = csv.writer(sheet, delimiter="," if suffix == ".csv" else "\t")
        writer.writerow(objects[0] if objects else [])
        writer.writerows(row.values() for row in objects)
        text = sheet.getvalue()
    elif suffix == ".json":
        text = json.dumps(found, indent=1)
    elif suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in found)
    else:
        text = "\n\n".join(str(row) for row in found)
    text = text.replace(f'"{HUGE}"', "9" * 4900).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    return text.encode(errors="surrogatepass")


options = st.just({}) | st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["alpaca", "messages", "prompt_completion", "text", "classification"]),
        "max_length": st.sampled_from([1, 8]),
        "loss_on": st.just("all"),
        "on_too_long": st.just("drop"),
        "eval_fraction": st.just(0.5),
        "columns": st.sampled_from([{"x": "y"}, {"prompt": "text"}, {"instruction": "prompt", "output": "completion"}]),
        "ignore": st.sampled_from([["tools"], ["label", "images", "weight"], ["content"]]),
    },
)
tasks = st.sampled_from(["causal_lm"] * 9 + ["sequence_classification"])


def is_rows_or_a_mistake(file: tuple[str, bytes], chosen: dict[str, Any], task: str) -> None:
    suffix, content = file
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        cache = Path(directory, "cache")
        patch.setenv("LISA_DS_CACHE", str(cache))
        path = Path(directory, f"rows{suffix}")
        path.write_bytes(content)
        begun, mistake = time.monotonic(), f"{path}: none"
        try:
            found, _ = load_dataset(DataConfig(path=str(path), **chosen), tokenizer(), task=task)
            assert all(len(row["input_ids"]) for row in found)
        except LisaError as error:
            mistake = str(error)
        event("rows" if mistake.endswith(": none") else "a mistake")
        assert str(path) in mistake
        assert len(mistake.encode()) < 3000  # and it can be printed
        assert time.monotonic() - begun < 30
        left = [
            entry.name
            for entry in cache.glob("data/*")
            if entry.name.startswith(".") or not (entry.is_dir() or entry.suffix == ".lock")
        ]
        assert not left
        assert all(
            {inner.name for inner in entry.iterdir()} == {"rows.arrow", "counts.json"}
            for entry in cache.glob("data/*")
            if entry.is_dir()
        )


SETTINGS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(SETTINGS, max_examples=120, derandomize=True)
@given(files(), options, tasks)
@example((".jsonl", b'{"text": "a", "x": ' + b"9" * 4900 + b"}"), {}, "causal_lm")  # each was a traceback
@example((".jsonl", b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"), {}, "causal_lm")
def test_a_data_file(file: tuple[str, bytes], chosen: dict[str, Any], task: str) -> None:
    is_rows_or_a_mistake(file, chosen, task)


@pytest.mark.nightly
@settings(SETTINGS, max_examples=3000)
@given(files(), options, tasks)
def test_many_data_files(file: tuple[str, bytes], chosen: dict[str, Any], task: str) -> None:
    is_rows_or_a_mistake(file, chosen, task)
