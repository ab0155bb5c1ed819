"""Conversations of every kind, and what a chat template makes of one."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lisa_ds.data import preview
from lisa_ds.data.tokenise import Tokeniser, Tokens

Turn = dict[str, Any]


def of_trl() -> dict[str, str]:
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec else None
    found = (path for place in places or () for path in Path(place, "chat_templates").glob("*.jinja"))
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(found)}


TEMPLATES = of_trl()
DEEPSEEKS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
ORIGINALS: list[Any] = [name for name in TEMPLATES if not name.endswith("_training")] or [
    pytest.param("none", marks=pytest.mark.skip(reason="needs trl with its chat templates"))
]


@cache
def vocabulary() -> Tokenizer:
    """Bytes, and as tokens of their own the marks that the templates write."""
    marks = sorted(
        {mark for text in TEMPLATES.values() for mark in re.findall(r"<[|\uff5c][^<>]+?[|\uff5c]?>|<[\w|]+>", text)}
    )
    special = ["<|pad|>", "<|end_of_text|>", *marks]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def tokenizer(template: str | dict[str, str]) -> Any:
    made = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary(), pad_token="<|pad|>", eos_token="<|end_of_text|>", bos_token="<|pad|>"
    )
    made.chat_template = template
    return made


def turn(role: str, content: str, **more: Any) -> Turn:
    return {"role": role, "content": content, **more}


def user(content: str = "what?", **more: Any) -> Turn:
    return turn("user", content, **more)


def says(content: str, **more: Any) -> Turn:
    return turn("assistant", content, **more)


def call(name: str, number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def returned(content: str, name: str = "look", number: int = 1) -> Turn:
    return turn("tool", content, name=name, tool_call_id=f"call_{number}")


PARAMETERS = {"type": "object", "properties": {"place": {"type": "string", "description": "where"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": PARAMETERS}}]
CALLS = {"tool_calls": [call("look", place="Rome")]}

# What a row may hold; turns, and whether tools come with them.
KINDS: dict[str, list[Turn]] = {
    "one turn": [user(), says("seven")],
    "several turns": [user("a"), says("one"), user("b"), says("two\n\ntwo"), user("c"), says("three")],
    "system": [turn("system", "be brief"), user(), says("seven")],
    "equal turns": [user("seven"), says("seven"), user("seven"), says("seven")],
    "template's words": [user("assistant"), says("assistant model user"), user("b"), says("</s> end")],
    "ends with a question": [user("a"), says("b"), user("c")],
    "empty answer": [user("a"), says(""), user("b"), says("c")],
    "greeting": [says("hello"), user("a"), says("b")],
    "reasoning": [user(), says("seven", reasoning_content="six and one")],
    "earlier reasoning": [user("a"), says("b", reasoning_content="hm"), user("c"), says("d", reasoning_content="ho")],
    "thoughts in content": [user(), says("<think>\nsix and one\n</think>\n\nseven")],
    "tools": [user(), says("seven")],
    "call": [user(), says("", **CALLS)],
    "call and return": [user(), says("", **CALLS), returned("sunny"), says("It is sunny.")],
    "call with words": [user(), says("Let me see.", **CALLS), returned("sunny"), says("It is sunny.")],
    "call with reasoning": [user(), says("", reasoning_content="look", **CALLS), returned("sunny"), says("Sunny.")],
    "two calls": [
        user(),
        says("", tool_calls=[call("look", place="Rome"), call("look", 2, place="Oslo")]),
        returned("sunny"),
        returned("rain", number=2),
        says("Sunny, and rain."),
        user("thanks"),
        says("Any time."),
    ],
}
WITH_TOOLS = {"tools", "call", "call and return", "call with words", "call with reasoning", "two calls"}


def row(messages: list[Turn], tools: Any = None) -> dict[str, Any]:
    return {"messages": json.dumps(messages), "tools": json.dumps(tools), "place": "rows.jsonl:1"}


def tokens(template: Any, messages: list[Turn], tools: Any = None, **options: Any) -> Tokens:
    made = tokenizer(template) if isinstance(template, (str, dict)) else template
    return Tokeniser(made, "conversation", 100_000, **options).row(row(messages, tools))


def learned(made: Tokens, by: Any) -> list[str]:
    """The stretches of text that carry loss."""
    shown = preview({"input_ids": made.ids, "labels": made.labels}, by)
    return [part.partition("⟧")[0] for part in shown.split("⟦")[1:]]


SAYS = "{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}{{ eos_token }}"
ASKS = "{% if add_generation_prompt %}<|model|>{% endif %}"
EOS = "<|end_of_text|>"

MARK = "set data.chat_template to a file with its text, in which {% generation %} and {% endgeneration %} stand around each answer"

PLAINLY = "{% for m in messages %}" + SAYS + "{% endfor %}" + ASKS

BY_MARKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|model|>{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|user|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}" + ASKS
)
