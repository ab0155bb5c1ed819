"""A file that is broken, or that says a thing twice, is a mistake with a place, never a traceback."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from lisa_ds.errors import DataError
from tests.data.rows import fresh_cache, load, text

__all__ = ["fresh_cache"]

DEEP = b'{"x": ' * 100_000 + b"1" + b"}" * 100_000
LONG = b"1" * 4900


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # places
        ("a.jsonl", b'{"a": 1\n', ":1: not valid JSON: Expecting ',' delimiter (column 8)"),
        ("a.jsonl", b'{"text": "x"}\r\n{"text": \r\n', ":2: not valid JSON: Expecting value (column 9)"),
        ("a.jsonl", b'\xef\xbb\xbf{"text" "x"}\n', ":1: not valid JSON: Expecting ':' delimiter (column 9)"),
        ("a.json", b'[{"text": "x"},\n {"text": "y"\n\n\n', ":2: not valid JSON: Expecting ',' delimiter (column 14)"),
        ("a.json", b'{"text": "x"\n}\n\n{"te', ":1: not valid JSON: Expecting ',' delimiter (column 13)"),
        ("a.jsonl", b'{"text": "\xc3\xa9" 1}\n', ":1: not valid JSON: Expecting ',' delimiter (column 14)"),
        # numbers that Python does not convert, and nesting that it does not follow
        ("a.jsonl", b'{"text": "x"}\n{"text": "x", "n": ' + LONG + b"}", ":2: not valid JSON: a number has too many digits"),
        ("a.json", b'[{"text": "x", "n": -' + LONG + b"}]", ": not valid JSON: a number has too many digits"),
        ("a.jsonl", b'{"text": ' + LONG + b"}", ":1: not valid JSON: a number has too many digits"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "q"}], "tools": "[' + LONG + b']"}', ":1: tools should be valid JSON (a number has too many digits), got '[111"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x", "n": ' + DEEP + b"}", ":2: not valid JSON: nested too deeply"),
        ("a.json", b"[" * 100_000, ": not valid JSON: nested too deeply"),
        # the same name twice
        ("a.jsonl", b'{"text": "x", "text": "y"}', ":1: not valid JSON: the key 'text' is there twice in one object"),
        ("a.jsonl", b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', ":1: not valid JSON: the key 'role' is there twice in one object"),
        ("a.json", b'[{"text": "x", "n": {"a": 1, "b": 2, "a": 3}}]', ": not valid JSON: the key 'a' is there twice in one object"),
        ("a.csv", b"text,label,text\nx,1,y\n", ":1: the header has the column 'text' twice"),
        ("a.tsv", b"\xef\xbb\xbftext\ttext\nx\ty\n", ":1: the header has the column 'text' twice"),
        # what is not text
        ("a.jsonl", b'{"text": NaN}', ":1: text should be text, got nan"),
        ("a.jsonl", b'{"text": Infinity}', ":1: text should be text, got inf"),
        ("a.jsonl", b'{"\\ud83d": "x"}', r":1: no accepted form has the columns '\ud83d'"),
        ("a.csv", b"text\n" + b"x\n" * 9000 + b"\xff\n", ":9002: not UTF-8 (invalid start byte at byte 1 of the line)"),
        ("a.txt", b"x\n" * 9000 + b"ab\xff\n", ":9001: not UTF-8 (invalid start byte at byte 3 of the line)"),
        ("a.json", b'[\n{"text": "\xe9"}]', ":2: not UTF-8 (invalid continuation byte at byte 11 of the line)"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), ":1: not UTF-8 (invalid start byte at byte 1 of the line)"),
        # nothing
        ("a.jsonl", b"", ": holds no rows"),
        ("a.jsonl", b"\xef\xbb\xbf", ": holds no rows"),
        ("a.json", b"", ": holds no rows"),
        ("a.json", b"\xef\xbb\xbf \n", ": holds no rows"),
        ("a.csv", b"", ": holds no rows"),
        ("a.csv", b"text\n", ": holds no rows"),
        ("a.txt", b"", ": holds no rows"),
        ("a.parquet", b"", ": not a valid parquet file: Parquet file size is 0 bytes"),
    ],
)  # fmt: skip
def test_what_is_broken_has_a_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert len(str(caught.value)) < 2000
    assert not [entry for entry in (tmp_path / "cache/data").glob("*") if entry.is_dir()]


@pytest.mark.parametrize("depth", [200, 400, 600, 800, 900, 950, 980, 1100])
@pytest.mark.parametrize("row", [b'{"text": "x", "n": %s}', b'{"text": %s}'])
def test_nesting_that_json_can_follow_and_python_cannot(row: bytes, depth: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for before in (b"", b'{"text": "x"}\n'):
        path.write_bytes(before + row % (b'{"x": ' * depth + b"1" + b"}" * depth))
        if b'"n"' in row and depth < 980:  # how deep Python goes depends on who calls
            with contextlib.suppress(DataError):
                assert text(path)[0] == "x<|end|>"
            continue
        with pytest.raises(DataError) as caught:
            load(path)
        deep, malformed = "nested too deeply", "text should be text, got {'x': {'x':"
        assert re.match(rf"{path}:{2 if before else 1}: ((not valid JSON: )?{deep}|{malformed})", str(caught.value))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "x", "n": NaN, "m": Infinity}\r\n'),
        ("a.json", b'\xef\xbb\xbf[{"text": "x"}]'),
        ("a.csv", b"\xef\xbb\xbftext,n\r\nx,1\r\n"),
        ("a.txt", b"\xef\xbb\xbfx"),
        ("a.jsonl", b'{"text": "x", "label": null}\n'),  # a column that says nothing makes no other form
    ],
)
def test_what_is_unusual_is_read(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert text(path) == ["x<|end|>"]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"y": [{"z": 2}, {"w": None}]}}}
CALLS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "assistant", "content": "a"}]}
    for call in (CALL, OTHER)
]  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_nulls_of_shared_keys_are_not_there(kind: str, tmp_path: Path) -> None:
    """Arrow gives all objects of a column the same keys."""
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(CALLS), path)
    else:
        datasets.Dataset.from_list(CALLS).save_to_disk(str(path))
    assert text(path, loss_on="all") == [
        'user: q<|end|>\nassistant: [f {"x": 1}]<|end|>\nassistant: a<|end|>\n',
        'user: q<|end|>\nassistant: [g {"y": [{"z": 2}, {}]}]<|end|>\nassistant: a<|end|>\n',
    ]


@pytest.mark.parametrize(
    "value",
    [
        b"\xff\x00",
        datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        datetime.date(2020, 1, 1),
        datetime.timedelta(days=1),
        decimal.Decimal("1.5"),
        {"a": {"b": [{"c": b"x"}]}},
        [[1, 2], [3]],
    ],
)
def test_columns_of_parquet_that_are_not_used(value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": "x", "v": value}]), path)
    assert text(path) == ["x<|end|>"]
    assert "columns not used: 'v' (1 row)" in caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table([["x"], ["y"]], names=["text", "text"]), ": the schema has the column 'text' twice"),
        (pa.table({"text": pa.array([b"\xff"])}), r": row 1: text should be text, got b'\xff'"),
        (pa.table({"text": [datetime.date(2020, 1, 1)]}), ": row 1: text should be text, got datetime.date(2020, 1, 1)"),
        (pa.table({"text": ["x"], "t": pa.array([10**15], pa.timestamp("ms"))}), ": column 't' cannot be read: "),
        (pa.table({"text": ["x"], "t": pa.array([1], pa.timestamp("s", tz="Nowhere/Land"))}), ": column 't' cannot be read: "),
        (pa.table({"text": pa.array([b"\xff"]).view(pa.utf8())}), ": column 'text' cannot be read: 'utf-8' codec can't decode"),
        (pa.table({"text": pa.array([], pa.string())}), ": holds no rows"),
        (pa.table({"messages": [[{"role": "user", "content": "q"}]], "tools": [[{"name": "f", "since": datetime.date(2020, 1, 1)}]]}), ": row 1: tools should be what JSON and Unicode can say"),
        (pa.table({"text": ["x"], "image": [{"bytes": b"\x89PNG", "path": None}]}), ": row 1: image is for a model that sees or hears"),
    ],
)  # fmt: skip
def test_columns_of_parquet_that_cannot_be_read(table: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_pictures_of_a_saved_data_set_are_refused_undecoded(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), image=datasets.Image())
    rows = {"text": ["x", "y"], "image": [None, {"bytes": b"no picture", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved \(train\): row 2: image is for a model that sees or hears"):
        load(tmp_path / "saved")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
@pytest.mark.parametrize(("suffix", "content"), [(".jsonl", b'{"text": "x"}'), (".txt", b"x"), (".csv", b"text\nx\n")])
def test_a_name_that_is_not_utf_8(suffix: str, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/a\xff" + suffix.encode())).write_bytes(content)
    assert text(folder) == ["x<|end|>"]


def test_a_home_that_is_nobodys() -> None:
    path = "~nobody-of-this-name/a.jsonl"
    with pytest.raises(DataError, match=rf"path: {path} cannot be read: Could not determine home directory"):
        load(path)


def test_renaming_what_only_some_rows_have(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "persona": "s"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = "user: q<|end|>\nassistant: a<|end|>\n"
    assert text(path, columns={"persona": "system"}) == [asked, "system: s<|end|>\n" + asked]
    with pytest.raises(DataError, match=r"rows.jsonl: data.columns renames 'perso', which no row has"):
        load(path, columns={"perso": "system"})
