"""Reads the turns of a conversation, under whatever names, into one form for the chat template.

A turn is a dict of ``role`` and ``content`` (a text, empty if there is none) and, where the row has them,
``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``name`` and ``learn``: whether the row itself says that an
answer carries loss or does not. The arguments of a tool call are an object, whether the row has it as one or as JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lisa_ds.data import strict_json
from lisa_ds.data.fields import Fields, Unused, says_something, shown
from lisa_ds.data.refusals import refuse_turn_fields
from lisa_ds.data.strict_json import NotJSON
from lisa_ds.errors import DataError

Turn = dict[str, Any]

_ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "function_call": "assistant", "tool_call": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool"},
}
_KEYS = (("role", "content"), ("from", "value"))
_CALLS = ("function_call", "tool_call")  # roles whose content is the calls
_REASONING = ("reasoning_content", "reasoning", "thinking")
_LEARN = ("weight", "loss", "train", "training")
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def turn(role: str, content: str) -> Turn:
    """A turn with a role and text, and nothing else."""
    return {"role": role, "content": content}


def read_turns(row: Fields, column: str, unused: Unused, keys: tuple[str, str] = ("role", "content")) -> list[Turn]:
    """The turns in a column.

    Args:
        row: The row.
        column: Its name.
        unused: Counts what is not used.
        keys: The names of role and content in this form, for messages; other forms' names are read, too.

    Raises:
        DataError: A turn is malformed, or has something that is not supported.
    """
    values = row.take(column)
    if not isinstance(values, list) or not values:
        raise row.wrong(column, f"a list of turns with {keys[0]!r} and {keys[1]!r}", values)
    turns: list[Turn] = []
    for number, value in enumerate(values):
        fields = row.part(f"{column}[{number}]", value, f"a turn with {keys[0]!r} and {keys[1]!r}")
        found = _read_turn(fields, keys, unused)
        if len(fields.values) > 2:  # most turns hold a role and a content alone
            _add_fields(fields, found)
            refuse_turn_fields(fields)
            unused.turns.update(name for name, _ in fields.rest())
        if turns and _goes_on(turns[-1], found):
            turns[-1]["tool_calls"] = [*turns[-1].get("tool_calls", ()), *found["tool_calls"]]
        else:
            turns.append(found)
    return turns


def _read_turn(fields: Fields, keys: tuple[str, str], unused: Unused) -> Turn:
    role_key, content_key = next((pair for pair in (keys, *_KEYS) if pair[0] in fields), keys)
    if role_key not in fields:
        raise _malformed(fields, keys)
    role = fields.take(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise fields.wrong(role_key, f"one of {', '.join(_ROLES)}", role)
    if role in _CALLS and not fields.says("tool_calls"):
        found = _call_turn(fields, content_key, unused)
    else:
        calls = _tool_calls(fields, _ROLES[role], unused)
        if content_key not in fields and not calls:
            raise _malformed(fields, keys)
        found = turn(_ROLES[role], _content(fields, content_key, unused, optional=bool(calls)))
        if calls:
            found["tool_calls"] = calls
    return found


def _malformed(fields: Fields, keys: tuple[str, str]) -> DataError:
    expected = f"a turn with {keys[0]!r} and {keys[1]!r}"
    return DataError(f"{fields.place}: {fields.path} should be {expected}, got {shown(fields.values)}")


def _add_fields(fields: Fields, found: Turn) -> None:
    """Add the optional fields of a turn."""
    _add_reasoning(fields, found)
    for name in ("tool_call_id", "name"):
        if text := fields.text(name, optional=True):
            found[name] = text
    _add_learn(fields, found)


def _goes_on(before: Turn, found: Turn) -> bool:
    """Whether a tool call in a turn of its own belongs to the assistant's turn right before it."""
    only_calls = {"role", "content", "tool_calls", "learn"}
    return (
        before["role"] == found["role"] == "assistant"
        and "tool_calls" in found
        and not found["content"]
        and found.keys() <= only_calls
        and before.get("learn") == found.get("learn")
    )


def read_tools(row: Fields) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call: ``tools``, or OpenAI's former ``functions``; as objects or as JSON."""
    tools = []
    for column in ("tools", "functions"):
        found = _parsed(row, column, row.take(column))
        if found is None:
            continue
        if not isinstance(found, list):
            raise row.wrong(column, "a list of tools, or JSON of one", found)
        for number, tool in enumerate(found):
            at = f"{column}[{number}]"
            if not isinstance(tool, dict) or tool.get("type", "function") != "function":
                raise row.wrong(at, "a tool with type 'function'", tool)
            function = tool.get("function", tool)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise row.wrong(at, "a tool with a function that has a name", tool)
            tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools or None


def _content(fields: Fields, key: str, unused: Unused, *, optional: bool) -> str:
    content = fields.take(key)
    if content is None and optional:
        return ""
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            inside = fields.part(f"{key}[{number}]", part)
            if (kind := inside.take("type")) != "text":
                raise inside.refused(
                    "type",
                    f"is {kind!r}, and only text is read; give thoughts as reasoning_content and calls as tool_calls, "
                    f"and leave out rows about pictures and sounds",
                )
            texts.append(inside.text("text"))
            unused.turns.update(f"{key}[].{name}" for name, _ in inside.rest())
        return "".join(texts)
    if not isinstance(content, str):
        raise fields.wrong(key, "text", content)
    return fields.encodable(key, content)


def _tool_calls(fields: Fields, role: str, unused: Unused) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, with the arguments as an object."""
    calls = []
    if found := fields.take("tool_calls"):
        if not isinstance(found, list):
            raise fields.wrong("tool_calls", "a list of calls", found)
        calls += [_call(fields, f"tool_calls[{number}]", call, unused) for number, call in enumerate(found)]
    if found := fields.take("function_call"):
        calls.append(_call(fields, "function_call", found, unused))
    if calls and role != "assistant":
        name = "tool_calls" if fields.says("tool_calls") else "function_call"
        raise fields.refused(name, f"is in a turn of role {role!r}; only the assistant calls tools")
    return calls


def _call_turn(fields: Fields, key: str, unused: Unused) -> Turn:
    """A turn whose content is a call, or a list of calls, as JSON; reasoning may precede it."""
    content = fields.text(key)
    found = turn("assistant", "")
    if thought := _THOUGHT.search(content):
        found["reasoning_content"] = thought[1].strip()
        content = content.replace(thought[0], "")
    calls = _parsed(fields, key, content)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise fields.wrong(key, "a call", calls)
    found["tool_calls"] = [_call(fields, key, call, unused) for call in calls]
    return found


def _call(fields: Fields, at: str, value: Any, unused: Unused) -> dict[str, Any]:
    call = fields.part(at, value)
    if (kind := call.take("type")) not in (None, "function"):
        raise call.wrong("type", "'function'", kind)
    function = call if call.take("function") is None else call.part("function", call.take("function"))
    arguments = _parsed(function, "arguments", function.take("arguments"))
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise function.wrong("arguments", "an object, or JSON of one", arguments)
    said = {"type": "function", "function": {"name": function.text("name"), "arguments": arguments}}
    if call.says("id"):
        said = {"id": call.text("id"), **said}
    kind = at.partition("[")[0]
    unused.turns.update(f"{kind}[].{name}" for part in {call, function} for name, _ in part.rest())
    return said


def _parsed(fields: Fields, name: str, value: Any) -> Any:
    """A text parsed as JSON; None for a blank one. Other values are returned as they are, if JSON can hold them."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = strict_json.parse(value)
        except NotJSON as error:
            raise fields.wrong(name, f"valid JSON ({error})", value) from None
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        raise fields.wrong(name, "what JSON and Unicode can say", value) from None
    return value


def _add_reasoning(fields: Fields, found: Turn) -> None:
    given = {name: text for name in _REASONING if (text := fields.text(name, optional=True)).strip()}
    if "reasoning_content" in found:
        given["<think>"] = found["reasoning_content"]
    if len(set(given.values())) > 1:
        raise fields.refused(" and ".join(given), "differ, and both are the thoughts of one turn; keep one")
    if given:
        found["reasoning_content"] = next(iter(given.values()))


def _add_learn(fields: Fields, found: Turn) -> None:
    """Whether the row says that a turn carries loss: OpenAI's and mistral-finetune's ``weight``, and flags of others."""
    given = {name: value for name in _LEARN if says_something(value := fields.take(name))}
    for name, value in given.items():
        if value not in (0, 1):  # true and false are
            raise fields.wrong(name, "0 or 1, false or true", value)
    if len({bool(value) for value in given.values()}) > 1:
        raise fields.refused(" and ".join(given), "contradict each other; keep one")
    if given:
        found["learn"] = bool(next(iter(given.values())))
        if found["learn"] and found["role"] != "assistant":
            raise fields.refused(
                next(iter(given)),
                f"asks to learn a turn of role {found['role']!r}; only the assistant's are: remove it",
            )
