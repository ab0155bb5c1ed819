"""Finds the assistant's answers in the text of a conversation: they alone carry loss.

An answer begins after the template's generation prompt, and ends with the token that ends the turn. Blanks that a
template writes after that token are left out, as the model need not generate them. If a template has ``{% generation
%}`` marks, they decide.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from lisa_ds.data.rendering import Conversation, Span, TemplateRefusal, is_marked
from lisa_ds.data.sentinels import found
from lisa_ds.data.templates import training_template
from lisa_ds.data.written import Unfit, Written
from lisa_ds.errors import DataError

_MARKED_FILE = " to a file with its text, in which {% generation %} and {% endgeneration %} stand around each answer"
_ENDS = "\n >])}:"  # of a word or a mark: an answer does not begin in the midst of one


class Note(enum.IntFlag):
    """Something about a row to report to the user, though the row is used."""

    THOUGHT_LEFT_OUT = 1
    ASKED_OTHERWISE = 2
    NO_END = 4
    NOT_MARKED = 8


@dataclass(frozen=True)
class Answers:
    """A conversation as text, and the spans of it that carry loss."""

    text: str
    spans: tuple[Span, ...]
    notes: Note


def find_answers(
    tokenizer: Any,
    conversation: Conversation,
    learn: Sequence[bool | None],
    place: str,
    *,
    loss_on_all: bool = False,
) -> Answers:
    """Render a conversation as text, and find the spans that carry loss.

    Args:
        tokenizer: With a chat template.
        conversation: The conversation of a row.
        learn: For each turn, whether the row says that it carries loss; None where it says nothing.
        place: File and line, for messages.
        loss_on_all: Everything carries loss but the turns that the row excludes.

    Raises:
        DataError: The template raises, leaves something out, or does not show where the answers are.
    """
    try:
        return _Finder(Written(tokenizer, conversation), tuple(learn)).find(loss_on_all=loss_on_all)
    except (TemplateRefusal, Unfit) as error:
        unfit = error if isinstance(error, Unfit) else Unfit(f"refuses this conversation: {error}")
        remedies = [f"set data.chat_template{_better(tokenizer, conversation, learn) or unfit.template}"]
        if unfit.key:
            remedies.append(f"leave it out with data.ignore: [{unfit.key}]")
        if unfit.untold:
            remedies.append("set data.loss_on: all")
        raise DataError(f"{place}: the tokenizer's chat template {unfit}; {', or '.join(remedies)}") from error


def _better(tokenizer: Any, conversation: Conversation, learn: Sequence[bool | None]) -> str | None:
    """The training variant of the same model's template, if it can render this conversation."""
    try:
        training = training_template(tokenizer.get_chat_template(tools=conversation.tools_or_none()))
    except (AttributeError, ValueError):  # one of several, none of which is for all; or none written in Jinja
        return None
    if training is None:
        return None
    name, text = training
    other = copy(tokenizer)
    other.chat_template = text
    try:
        _Finder(Written(other, conversation), tuple(learn)).find(loss_on_all=False)
    except (TemplateRefusal, Unfit):
        return None
    return f": {name}"


@dataclass(frozen=True)
class _Finder:
    written: Written
    learn: tuple[bool | None, ...]

    def find(self, *, loss_on_all: bool) -> Answers:
        text = self.written.full.text
        wanted = [turn for turn in range(len(self.learn)) if self._is_learned(turn)]
        notes = Note.THOUGHT_LEFT_OUT if self.written.thoughts_left_out() & set(wanted) else Note(0)
        if loss_on_all:
            return Answers(text, self._but_excepted([(0, len(text))]), notes)
        tools = self.written.conversation.tools_or_none()
        if is_marked(self.written.tokenizer.get_chat_template(tools=tools)):
            notes |= self._check_marks(wanted)
            return Answers(text, self._but_excepted(self.written.full.marked), notes)
        spans = []
        for turn in wanted:
            span, note = self._answer(turn)
            spans.append(span)
            notes |= note
        return Answers(text, tuple(span for span in spans if span[0] < span[1]), notes)

    @property
    def _places(self) -> Mapping[int, Span]:
        return self.written.full.written

    def _but_excepted(self, spans: Iterable[Span]) -> tuple[Span, ...]:
        """``spans`` without the turns that the row excludes."""
        excepted = [turn for turn, learn in enumerate(self.learn) if learn is False]
        return tuple(_without(spans, map(self._place, excepted)))

    def _is_learned(self, turn: int) -> bool:
        """Whether a turn carries loss: as the row says, else if it is an answer: not empty, after a user's turn."""
        if self.learn[turn] is not None or self.written.role(turn) != "assistant":
            return bool(self.learn[turn])
        says = any(field.turn == turn for field in self.written.replaced.fields)
        return says and any(earlier["role"] == "user" for earlier in self.written.conversation.turns[:turn])

    def _place(self, turn: int) -> Span:
        """The span of a turn."""
        if turn not in self._places:
            raise self._untold(turn)
        return self._places[turn]

    def _check_marks(self, wanted: Sequence[int]) -> Note:
        marks = self.written.full.marked
        marked = [turn for turn, span in self._places.items() if any(_overlap(span, mark) for mark in marks)]
        bare = set(wanted).difference(marked)
        if wanted and len(bare) == len(wanted):
            raise Unfit("marks none of this conversation's answers with {% generation %}", _MARKED_FILE)
        for turn in marked:
            if self.written.role(turn) != "assistant":
                what = f"marks turn {turn + 1} ({self.written.role(turn)}) with {{% generation %}}, which is no answer"
                raise Unfit(what, _MARKED_FILE)
        return Note.NOT_MARKED if bare else Note(0)

    def _answer(self, turn: int) -> tuple[Span, Note]:
        if turn not in self._places or turn not in self.written.bare.written:
            return self._answer_by_prefix(turn)
        own = {number for field in self.written.replaced.fields if field.turn == turn for number in field.sentinels}
        if (own & found(self.written.bare.text)) - found(self.written.bare[turn]):
            raise self._untold(turn)  # written in another place as well
        begin, note = self._begin(turn)
        start, end = self._places[turn]
        piece = self.written.full[turn]
        others = {number for field in self.written.replaced.fields if field.turn != turn for number in field.sentinels}
        if found(self.written.bare[turn]) & others:
            # It holds what comes back from a tool, as Gemma 4's: said is what stands there while the turn is the last.
            alone = self.written.render(self.written.conversation.upto(turn + 1))
            if turn not in alone.written or not piece.startswith(alone[turn]):
                raise self._untold(turn)
            return (begin, start + len(alone[turn])), note
        closing = _common_end(piece, self.written.bare[turn])
        if closing.strip():
            return (begin, end - len(piece) + len(piece.rstrip())), note
        # Nothing but blanks closes the turn: the token that ends a text may stand behind.
        after = self.written.full.text[end:]
        if self._eos and after.lstrip().startswith(self._eos):
            end += len(after) - len(after.lstrip()) + len(self._eos)
        return (begin, end), note

    def _begin(self, turn: int) -> tuple[int, Note]:
        start, _ = self._places[turn]
        prompt, piece = self._prompt(turn), self.written.full[turn]
        if piece.startswith(prompt):
            return start + len(prompt), Note(0)
        own = _common_start(piece, self.written.bare[turn])  # of the template
        same, is_whole = _follow(prompt, own)
        if not is_whole:
            same = max(own.rfind(end, 0, same) + 1 for end in _ENDS)
        return start + same, Note.ASKED_OTHERWISE

    def _prompt(self, turn: int) -> str:
        """The generation prompt that the template writes after the turns before ``turn``."""
        if turn == 0:
            return self._usual_prompt
        start, _ = self._places[turn]
        asked = self.written.render(self.written.conversation.upto(turn), ask=True)
        last = max((earlier for earlier in range(turn) if earlier in self._places), default=None)
        since = 0 if last is None else self._places[last][0]
        if last is not None and (last not in asked.written or since > start):
            raise self._untold(turn)
        before, tail = self.written.full.text[since:start], asked.text[0 if last is None else asked.written[last][0] :]
        if tail.startswith(before):
            prompt = tail[len(before) :]
            if not prompt and self.written.full[turn].startswith(self._usual_prompt):
                return self._usual_prompt  # asked with nothing more, as after a tool, yet begun as elsewhere
            return prompt
        # The turn before is written otherwise while it is the last; then the prompt is what follows all turns.
        prompt = "" if last is None else asked.text[asked.written[last][1] :]
        if not _follow(prompt, self.written.full[turn])[0] and (prompt or self._usual_prompt):
            raise self._untold(turn)
        return prompt

    @cached_property
    def _usual_prompt(self) -> str:
        """The generation prompt after a single question."""
        question = Conversation(({"role": "user", "content": "."},))
        silent, asked = (self.written.render(question, ask=ask) for ask in (False, True))
        if asked.text.startswith(silent.text):
            return asked.text[len(silent.text) :]
        return asked.text[asked.written[0][1] :] if 0 in asked.written else ""

    def _answer_by_prefix(self, turn: int) -> tuple[Span, Note]:
        """For a template without a loop over the turns: compares renderings, of which one is a prefix of the other."""
        if turn == 0:
            raise self._untold(turn)
        before = self.written.render(self.written.conversation.upto(turn), ask=True).text
        upto = self.written.render(self.written.conversation.upto(turn + 1)).text
        if not upto.startswith(before) or not self.written.full.text.startswith(upto):
            raise self._untold(turn)
        closed = self._eos and upto.rstrip().endswith(self._eos)
        return (len(before), len(upto.rstrip() if closed else upto)), Note(0)

    @property
    def _eos(self) -> str:
        return self.written.tokenizer.eos_token or ""

    def _untold(self, turn: int) -> Unfit:
        what = f"does not let turn {turn + 1} ({self.written.role(turn)}) be told from the rest of the conversation"
        return Unfit(what, _MARKED_FILE, untold=True)


def _without(spans: Iterable[Span], excepted: Iterable[Span]) -> list[Span]:
    """The parts of ``spans`` outside ``excepted``, without empty ones."""
    left = list(spans)
    for low, high in excepted:
        left = [part for start, end in left for part in ((start, min(end, low)), (max(start, high), end))]
    return [(start, end) for start, end in left if start < end]


def _overlap(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def _follow(prompt: str, text: str) -> tuple[int, bool]:
    """How much of ``text`` matches ``prompt``, blanks aside, and whether all of ``prompt`` is matched."""
    asked, at, same = 0, 0, 0
    while asked < len(prompt):
        if at < len(text) and text[at] == prompt[asked]:
            asked, at, same = asked + 1, at + 1, at + 1
        elif at < len(text) and text[at].isspace():
            at += 1
        elif prompt[asked].isspace():
            asked += 1
        else:
            return same, False
    return same, True


def _common_start(*texts: str) -> str:
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _common_end(*texts: str) -> str:
    return _common_start(*(text[::-1] for text in texts))[::-1]
