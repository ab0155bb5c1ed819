"""Checks how a chat template renders a conversation: which shape of it is accepted, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lisa_ds.data.rendering import SHAPES, Conversation, Rendered, Shape, TemplateRefusal, render
from lisa_ds.data.sentinels import Field, Replaced, found, replace_fields

_IGNORABLE = ("tools", "tool_calls", "reasoning_content", "name")  # what data.ignore leaves out of conversations


class Unfit(Exception):
    """The template renders a conversation in a way that cannot be trained on.

    Args:
        what: Completes "the chat template ...".
        template: Completes "set data.chat_template".
        key: What ``data.ignore`` may name instead.
        untold: Whether the only problem is that the answers cannot be located.
    """

    def __init__(
        self, what: str, template: str = " to one that takes it", key: str | None = None, *, untold: bool = False
    ) -> None:
        super().__init__(what)
        self.template = template
        self.key = key
        self.untold = untold


@dataclass(frozen=True)
class Written:
    """A conversation as a tokenizer's chat template writes it.

    Raises:
        TemplateRefusal: The template raises on every shape of the conversation.
    """

    tokenizer: Any
    conversation: Conversation

    @cached_property
    def _shaped(self) -> tuple[Shape, Rendered, Rendered]:
        """The first shape of the conversation that the template renders whole; else the first it renders at all."""
        first: tuple[Shape, Rendered, Rendered] | TemplateRefusal | None = None
        for shape in SHAPES:
            try:
                full = render(self.tokenizer, shape(self.conversation))
                bare = render(self.tokenizer, shape(self.replaced.conversation))
            except TemplateRefusal as refusal:
                first = first or refusal
                continue
            written = found(bare.text)
            if all(field.sentinels <= written for field in self.replaced.fields if field.name == "content"):
                return shape, full, bare
            if not isinstance(first, tuple):
                first = shape, full, bare
        if not isinstance(first, tuple):
            assert first is not None
            raise first
        return first

    @property
    def full(self) -> Rendered:
        """The rendering of the conversation itself."""
        return self._shaped[1]

    @property
    def bare(self) -> Rendered:
        """The rendering with sentinels for all of the row's texts: everything else in it is the template's own."""
        return self._shaped[2]

    @cached_property
    def replaced(self) -> Replaced:
        """The conversation of sentinels, and the field that each stands for."""
        return replace_fields(self.conversation)

    def render(self, conversation: Conversation, *, ask: bool = False) -> Rendered:
        """Render another conversation, or a part of this one, in the same shape."""
        return render(self.tokenizer, self._shaped[0](conversation), ask=ask)

    def thoughts_left_out(self) -> set[int]:
        """Answers whose reasoning the template leaves out because other turns follow, as it does at inference.

        Raises:
            Unfit: The template leaves anything else out.
        """
        written, earlier = found(self.bare.text), set()
        for field in self.replaced.fields:
            if self._is_written(field, written):
                continue
            if field.is_thought and field.turn is not None and self._is_written_last(field, field.turn):
                earlier.add(field.turn)
                continue
            of = "" if field.turn is None else f" of turn {field.turn + 1} ({self.role(field.turn)})"
            key = next((key for key in _IGNORABLE if field.name.startswith(key)), None)
            if key == "tool_calls" and any(turn["role"] == "tool" for turn in self.conversation.turns):
                key = None  # what came back would answer nothing
            raise Unfit(f"does not write {field.name}{of}, so it would be lost", " to one that does", key)
        return earlier

    def _is_written(self, field: Field, written: frozenset[int]) -> bool:
        if field.text is not None and field.turn is not None and field.turn in self.full.written:
            return field.sentinels <= written and _solid(field.text) in _solid(self.full[field.turn])
        if field.sentinels <= written:
            return True
        try:
            return self.render(field.without).text != self.full.text
        except TemplateRefusal:
            return False

    def _is_written_last(self, field: Field, turn: int) -> bool:
        """Whether the template writes the reasoning of a turn while that is the last one."""
        return field.sentinels <= found(self.render(self.replaced.conversation.upto(turn + 1)).text)

    def role(self, turn: int) -> str:
        """The role of a turn."""
        role: str = self.conversation.turns[turn]["role"]
        return role


def _solid(text: str) -> str:
    """``text`` without blanks, which templates trim."""
    return "".join(text.split())
