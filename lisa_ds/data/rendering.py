"""Renders a conversation by its chat template, and finds the span of text that was written for each turn.

The template's own loop over the turns shows that: a copy of the template writes a mark where it begins a turn, where
the loop ends, and where its ``{% generation %}`` marks begin and end. The copy's result is used only if, without the
marks, it equals the text of the tokenizer's ``apply_chat_template``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

Turn = Mapping[str, Any]
Span = tuple[int, int]  # of characters

_MARK = re.compile("\ufdd0(-?[0-9]+|[a-z])\ufdd1")  # noncharacters: no text has them
_GENERATED, _ENDED = "\ufdd0g\ufdd1", "\ufdd0e\ufdd1"


class TemplateRefusal(Exception):
    """The template raised; the message is the template's own."""


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template: turns and tools."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    def upto(self, turn: int) -> Conversation:
        """The turns before ``turn``."""
        return replace(self, turns=self.turns[:turn])

    def tools_or_none(self) -> list[Mapping[str, Any]] | None:
        """The tools as ``apply_chat_template`` takes them."""
        return list(self.tools) if self.tools else None

    def with_calls_as_text(self) -> Conversation:
        """Arguments of tool calls as JSON text, for a template that joins them to text (DeepSeek-V3's)."""
        return replace(self, turns=tuple(map(_with_calls_as_text, self.turns)))

    def with_content_in_parts(self) -> Conversation:
        """Content as a list of parts, for a template that knows images as well (SmolVLM's)."""
        return replace(self, turns=tuple(map(_with_content_in_parts, self.turns)))


Shape = Callable[[Conversation], Conversation]
# Templates differ in what they take; most take what is stored.
SHAPES: tuple[Shape, ...] = (
    lambda conversation: conversation,
    Conversation.with_calls_as_text,
    Conversation.with_content_in_parts,
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    written: Mapping[int, Span]  # from a turn to where it stands; not for a turn that is written in several places
    marked: tuple[Span, ...]  # what stands between {% generation %} marks

    def __getitem__(self, turn: int) -> str:
        start, end = self.written[turn]
        return self.text[start:end]


def render(tokenizer: Any, conversation: Conversation, *, ask: bool = False) -> Rendered:
    """Render ``conversation`` by the tokenizer's chat template.

    Args:
        tokenizer: With a chat template.
        conversation: The conversation to render.
        ask: Whether to end with the generation prompt.

    Raises:
        TemplateRefusal: The template raises on it.
    """
    turns = [_known_by_every_name(turn) for turn in conversation.turns]
    tools = conversation.tools_or_none()
    try:
        text: str = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=ask)
        marked = _marked_copy(tokenizer.get_chat_template(tools=tools)).render(
            messages=turns,
            tools=tools,
            documents=None,
            add_generation_prompt=ask,
            **tokenizer.special_tokens_map,
            **_Marks(turns).functions(),
        )
    except Exception as error:  # a template is a program of others': it raises what it likes
        raise TemplateRefusal(str(error)) from error
    pieces = _MARK.split(marked)
    if "".join(pieces[::2]) != text:
        return Rendered(text, {}, ())
    return Rendered(text, *_places(pieces))


def is_marked(template: str) -> bool:
    """Whether a template has ``{% generation %}`` marks."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def _places(pieces: Sequence[str]) -> tuple[dict[int, Span], tuple[Span, ...]]:
    """The spans of turns and marks, from the pieces of text between the marks."""
    written: dict[int, list[Span]] = {}
    marked: list[Span] = []
    turn, begun, at = -1, None, 0
    for text, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        if text and turn >= 0:
            spans = written.setdefault(turn, [])
            if spans and spans[-1][1] == at:
                spans[-1] = (spans[-1][0], at + len(text))
            else:
                spans.append((at, at + len(text)))
        at += len(text)
        if mark == "g":
            begun = at
        elif mark == "e":
            if begun is not None and begun < at:
                marked.append((begun, at))
            begun = None
        elif mark:
            turn = int(mark)
    return {turn: spans[0] for turn, spans in written.items() if len(spans) == 1}, tuple(marked)


class _Marks:
    """Functions that the copy of a template calls while it is rendered, to note which turn is being written."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._numbers = {id(turn): number for number, turn in enumerate(turns)}
        self._loops: list[tuple[int, int]] = []  # loops over turns that are being run, and the turn of each

    def functions(self) -> dict[str, Any]:
        return {"_lisa_take_up": self._take_up, "_lisa_leave": self._leave}

    def _take_up(self, loop: int, *targets: Any) -> str:
        number = next((self._numbers[id(target)] for target in targets if id(target) in self._numbers), None)
        if number is None:
            return ""
        if self._loops and self._loops[-1][0] == loop:
            self._loops.pop()
        self._loops.append((loop, number))
        return self._mark()

    def _leave(self, loop: int) -> str:
        if not self._loops or self._loops[-1][0] != loop:
            return ""
        self._loops.pop()
        return self._mark()

    def _mark(self) -> str:
        return f"\ufdd0{self._loops[-1][1] if self._loops else -1}\ufdd1"


class _Marker(NodeTransformer):
    """Adds the calls that write marks to a parsed template."""

    def __init__(self) -> None:
        self._count = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        self._count += 1
        loop = nodes.Const(self._count)
        targets = [nodes.Name(name.name, "load") for name in _names(node.target)]
        node.body.insert(0, _output(_call("_lisa_take_up", loop, *targets)))
        return [node, _output(_call("_lisa_leave", loop))]

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self.generic_visit(node)
        if isinstance(node.call.node, nodes.ExtensionAttribute):  # of transformers: {% generation %}
            node.body = [_output(nodes.Const(_GENERATED)), *node.body, _output(nodes.Const(_ENDED))]
        return node


@lru_cache(maxsize=8)
def _marked_copy(template: str) -> jinja2.Template:
    environment = _compile_jinja_template(template).environment
    tree = _Marker().visit(environment.parse(template))
    tree.set_environment(environment)
    copy: jinja2.Template = environment.from_string(tree)
    return copy


def _names(target: nodes.Node) -> list[nodes.Name]:
    return [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)


def _output(*expressions: nodes.Expr) -> nodes.Output:
    return nodes.Output(list(expressions), lineno=1)


def _known_by_every_name(turn: Turn) -> dict[str, Any]:
    """A copy of a turn without null fields, its reasoning also under the name that gpt-oss and LFM2.5 read."""
    given = {key: value for key, value in turn.items() if value is not None}
    return {"thinking": given["reasoning_content"], **given} if "reasoning_content" in given else given


def _with_calls_as_text(turn: Turn) -> Turn:
    if not turn.get("tool_calls"):
        return turn
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"].get("arguments"))}}
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_content_in_parts(turn: Turn) -> Turn:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]} if "content" in turn else turn
