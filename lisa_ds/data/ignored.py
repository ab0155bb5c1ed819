"""Applies ``data.ignore``: leaves columns, and fields of turns, out of rows, by their own names or by ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from lisa_ds.data.fields import says_something
from lisa_ds.data.files import Row


def leave_out(row: Row, names: Collection[str], counts: Counter[str]) -> Row:
    """The row as it was read, without the columns and the fields of turns that ``names`` holds."""
    if not names:
        return row
    fields = _without(row.fields, names, counts)
    for column, value in fields.items():
        if isinstance(value, list):
            fields[column] = [_turn(turn, names, counts) if isinstance(turn, Mapping) else turn for turn in value]
    return Row(row.place, fields, row.starts, row.ends)


def leave_out_read(content: dict[str, Any], names: Collection[str], counts: Counter[str]) -> dict[str, Any]:
    """The same for a converted row, where a field has our name: ``reasoning_content`` for ``thinking``."""
    if not names or "messages" not in content:
        return content
    given = {**content, "messages": [_without(turn, names, counts) for turn in content["messages"]]}
    if "tools" in names and given.get("tools"):
        counts["tools"] += 1
        given["tools"] = None
    return given


def _turn(turn: Mapping[str, Any], names: Collection[str], counts: Counter[str]) -> dict[str, Any]:
    left = _without(turn, names, counts)
    if len(left) < len(turn) and not {"content", "value"} & set(turn):
        left["content"] = ""  # a turn that held calls alone
    return left


def _without(fields: Mapping[str, Any], names: Collection[str], counts: Counter[str]) -> dict[str, Any]:
    counts.update(name for name, value in fields.items() if name in names and says_something(value))
    return {name: value for name, value in fields.items() if name not in names}
