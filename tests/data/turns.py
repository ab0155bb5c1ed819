"""Turns as data sets of several kinds write them."""

from __future__ import annotations

from typing import Any

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

Q, A = "user: q<|end|>\n", "assistant: a<|end|>\n"


def turn(role: str, content: Any = "", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def said(role: str, value: Any, **fields: Any) -> dict[str, Any]:
    """A turn of ShareGPT's."""
    return {"from": role, "value": value, **fields}


def answered(**fields: Any) -> dict[str, Any]:
    """Messages whose answer holds more than its content."""
    return {"messages": [ASK, {**ANSWER, **fields}]}


TALK = {"messages": [ASK, ANSWER]}
