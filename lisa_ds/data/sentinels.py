"""Replaces every field of a conversation by a sentinel text, to see whether and where a template writes the field."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lisa_ds.data.rendering import Conversation

_SENTINEL = re.compile("\ufdd2([0-9]+)\ufdd3")  # noncharacters: no text has them
_THINKING = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Field:
    """A field of a conversation that is not empty, so that a template must write it."""

    turn: int | None  # none for the list of tools
    name: str
    sentinels: frozenset[int]  # that stand for it
    without: Conversation  # but for this field
    text: str | None = None  # what must be written as it stands; none if it may be escaped, say
    is_thought: bool = False


@dataclass(frozen=True)
class Replaced:
    """A conversation of sentinels, and the field that each stands for."""

    conversation: Conversation
    fields: tuple[Field, ...]


def found(text: str) -> frozenset[int]:
    """The sentinels in a text."""
    return frozenset(map(int, _SENTINEL.findall(text)))


def replace_fields(conversation: Conversation) -> Replaced:
    """Replace each text of a conversation by a sentinel, and keep its shape: roles, keys, calls and reasoning."""
    fields: list[Field] = []
    count = 0

    def sentinel() -> str:
        nonlocal count
        count += 1
        return f"\ufdd2{count}\ufdd3"

    def add(turn: int | None, name: str, sentinels: list[str], without: Conversation, **more: Any) -> None:
        fields.append(Field(turn, name, found("".join(sentinels)), without, **more))

    turns = []
    for number, turn in enumerate(conversation.turns):
        changes: dict[str, Any] = {}
        speaks = turn["role"] == "assistant"
        but_for = _but_for(conversation, number)
        content = turn.get("content") or ""
        thinking = _THINKING.fullmatch(content) if speaks else None
        if thinking:
            begin, thought, end, said = thinking.groups()
            if thought.strip():
                new = sentinel()
                add(number, "content up to </think>", [new], but_for(content=said), text=thought, is_thought=True)
                begin += new
            if said.strip():
                new = sentinel()
                add(number, "content", [new], but_for(content=content[: -len(said)]), text=said)
                end += new
            changes["content"] = begin + end
        elif content.strip():
            changes["content"] = sentinel()
            add(number, "content", [changes["content"]], but_for(content=""), text=content if speaks else None)
        if (thought := turn.get("reasoning_content") or "").strip():
            new = changes["reasoning_content"] = sentinel()
            without = but_for(reasoning_content=None)
            add(number, "reasoning_content", [new], without, text=thought, is_thought=True)
        if turn.get("name") and not (turn["role"] == "tool" and turn["name"] in _called(conversation, number)):
            # The name of a tool says again what was called: most templates write it once.
            changes["name"] = sentinel()
            add(number, "name", [changes["name"]], but_for(name=None))
        if calls := turn.get("tool_calls"):
            changes["tool_calls"] = []
            for index, call in enumerate(calls):
                function, new = call["function"], sentinel()
                name = f"tool_calls[{index}]" if len(calls) > 1 else "tool_calls"
                others = [*calls[:index], *calls[index + 1 :]]
                add(number, name, [new], but_for(tool_calls=others or None))
                arguments = _replaced(function.get("arguments"), sentinel)
                if values := [*arguments.values()] if isinstance(arguments, Mapping) else [arguments] * bool(arguments):
                    bare = {**call, "function": {**function, "arguments": {}}}
                    without = but_for(tool_calls=[*calls[:index], bare, *calls[index + 1 :]])
                    add(number, f"{name}.function.arguments", values, without)
                changes["tool_calls"].append({**call, "function": {**function, "name": new, "arguments": arguments}})
        turns.append({**turn, **changes})
    tools = conversation.tools
    if tools:
        names = [sentinel() for _ in tools]
        tools = tuple(map(_named, tools, names))
        add(None, "tools", names, replace(conversation, tools=None))
    return Replaced(Conversation(tuple(turns), tools), tuple(fields))


def _but_for(conversation: Conversation, number: int) -> Callable[..., Conversation]:
    """A function that returns the conversation with keys of a turn changed; a key set to None is removed."""

    def changed(**changes: Any) -> Conversation:
        turn = {key: value for key, value in {**conversation.turns[number], **changes}.items() if value is not None}
        return replace(conversation, turns=(*conversation.turns[:number], turn, *conversation.turns[number + 1 :]))

    return changed


def _called(conversation: Conversation, number: int) -> set[str]:
    return {call["function"]["name"] for turn in conversation.turns[:number] for call in turn.get("tool_calls") or ()}


def _replaced(arguments: Any, sentinel: Callable[[], str]) -> Any:
    if isinstance(arguments, Mapping):
        return {key: sentinel() for key in arguments}
    return sentinel() if arguments else arguments


def _named(tool: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    function = tool.get("function")
    return {**tool, "function": {**function, "name": name}} if isinstance(function, Mapping) else {**tool, "name": name}
