"""What of a row is not used is told, with counts, and changes nothing about which rows are held out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset
from tests.data.rows import fresh_cache, load, text, tokenizer, write
from tests.data.turns import ANSWER, CALL, TALK, A, Q, answered, said, turn

__all__ = ["fresh_cache"]

# --- told -----------------------------------------------------------------------------------------------------------


def test_what_is_not_used_is_told_with_counts_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {
            "id": i,
            "messages": [turn("user", f"q{i}"), {**ANSWER, "model": "m" if i else None}],
            "source": "web" if i < 3 else "",
            "tags": [],
            "label": None,
        }
        for i in range(1200)
    ]
    rows[7]["messages"][0] = turn("user", [{"type": "text", "text": "<image>q", "cache_control": "x"}])
    path = write(tmp_path / "rows.jsonl", *rows)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        load_dataset(DataConfig(path=path, eval_fraction=0.2), tokenizer())
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: columns not used: 'id' (1,200 rows), 'source' (3 rows)",
            f"{path}: fields of turns not used: 'model' (1,199 turns), 'content[].cache_control' (1 turn)",
            f"{path}: learned as plain text, though it stands for something else in the data of others: '<image>' (1 row)",
        ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "a", "score": 0.9, "url": "u"}, "columns not used: 'score' (1 row), 'url' (1 row)"),
        ({**TALK, "parallel_tool_calls": False}, "columns not used: 'parallel_tool_calls' (1 row)"),
        ({**TALK, "label": "greeting"}, "columns not used: 'label' (1 row)"),
        ({"instruction": "q", "output": "a", "text": "qa"}, "columns not used: 'text' (1 row)"),
        ({"prompt": "q", "completion": "a", "\ud83d": 1}, r"columns not used: '\ud83d' (1 row)"),
        (answered(tool_calls=[{**CALL, "index": 0}]), "fields of turns not used: 'tool_calls[].index' (1 turn)"),
        ({"conversations": [said("human", "q"), said("gpt", "a", weight=1, lang="en")]}, "fields of turns not used: 'lang' (1 turn)"),
    ],
)  # fmt: skip
def test_what_means_nothing_here_is_told(row: Any, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    load(path)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {told}"]


def test_a_column_that_a_renaming_hides_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**TALK, "persona": "s", "system": "t"}, {**TALK, "system": "t"}]
    path = write(tmp_path / "rows.jsonl", *rows)
    assert text(path, columns={"persona": "system"}) == [f"system: {system}<|end|>\n" + Q + A for system in "st"]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: columns not used: 'system' (1 row)"]


def test_a_blank_answer_in_the_first_row_makes_no_other_form(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": answer, "text": "qa"} for answer in ("", "a")]
    assert text(write(tmp_path / "rows.jsonl", *rows)) == [Q + A]


def test_a_data_set_of_its_own_is_told_of_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write(tmp_path / name, {**TALK, "id": 1}) for name in ("a.jsonl", "b.jsonl")]
    load_dataset(DataConfig(path=paths[0], eval_path=paths[1]), tokenizer())
    assert [record.getMessage() for record in caplog.records] == [f"{p}: columns not used: 'id' (1 row)" for p in paths]


# --- splits stay ----------------------------------------------------------------------------------------------------


def test_rows_that_hold_nothing_new_are_held_out_as_before(tmp_path: Path) -> None:
    """By a hash of roles and contents alone, whatever else a row might have held."""
    rows = [{"messages": [turn("user", f"q{i}"), turn("assistant", f"a{i}")]} for i in range(60)]
    hashes = [hashlib.sha256(f"0\0{json.dumps(row, sort_keys=True)}".encode()).digest()[:6] for row in rows]
    held_out = [i for i, digest in enumerate(hashes) if int.from_bytes(digest, "big") / 2**48 < 0.3]
    assert 5 < len(held_out) < 30
    _, rest = load_dataset(DataConfig(path=write(tmp_path / "a.jsonl", *rows), eval_fraction=0.3), tokenizer())
    assert rest is not None
    assert [tokenizer().decode(row["input_ids"]) for row in rest] == [
        f"user: q{i}<|end|>\nassistant: a{i}<|end|>\n" for i in held_out
    ]
