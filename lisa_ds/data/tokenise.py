"""Turns rows into tokens, and decides which of these carry loss.

A conversation goes through the tokenizer's chat template. Loss is on what the assistant says and on the token that
ends its turn, and on nothing else; :mod:`lisa_ds.data.answers` says where that is in the text.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from lisa_ds.config.base import show
from lisa_ds.data.answers import Note, find_answers
from lisa_ds.data.formats import Kind
from lisa_ds.data.rendering import Conversation, Span
from lisa_ds.errors import DataError

IGNORED = -100  # the label of a token without loss, as torch.nn.CrossEntropyLoss has it

# For a tokenizer without a chat template: the layout that alpaca made common.
INSTRUCTION_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ '### Instruction:\\n' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)


class Status(enum.IntEnum):
    """What became of a row: kept, cut to length, or left out for want of an answer or for its length."""

    KEPT = 0
    CUT = 1
    NO_ANSWER = 2
    TOO_LONG = 3


class Tokens(NamedTuple):
    """A row as the model is trained on it."""

    ids: list[int]
    labels: Any  # of each token, :data:`IGNORED` where there is no loss; the class, for classification
    status: Status
    notes: Note = Note(0)


@dataclass(frozen=True)
class Tokeniser:
    """Turns rows of one kind into ``input_ids`` and ``labels``."""

    tokenizer: Any
    kind: Kind
    max_length: int
    loss_on_all: bool = False
    drop_too_long: bool = False
    cut_later: bool = False  # by packing
    labels: tuple[str, ...] | None = None  # names of the classes; none if they are numbers

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokens of a batch of rows, for ``Dataset.map``."""
        made = [self.row(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        return dict(zip(("input_ids", "labels", "status", "notes"), map(list, zip(*made, strict=True)), strict=True))

    def row(self, row: dict[str, Any]) -> Tokens:
        """Tokens of one row."""
        if self.kind == "classification":
            return self._classified(row)
        notes = Note(0)
        if self.kind == "text":
            ids = self._document(row) if row["text"].strip() else []
            loss = [True] * len(ids)
        else:
            ids, loss, notes = self._conversation(row)
        status = Status.KEPT
        if len(ids) > self.max_length and not self.cut_later:
            status = Status.TOO_LONG if self.drop_too_long else Status.CUT
            ids, loss = ids[: self.max_length], loss[: self.max_length]
        if status is not Status.TOO_LONG and not any(loss[1:]):  # nothing predicts the first token
            status = Status.NO_ANSWER
        labels = [token if learned else IGNORED for token, learned in zip(ids, loss, strict=True)]
        return Tokens(ids, labels, status, notes)

    def _classified(self, row: dict[str, Any]) -> Tokens:
        label = json.loads(row["label"])
        if self.labels:
            if label not in self.labels:
                raise DataError(f"{row['place']}: label should be one of {', '.join(self.labels)}, got {show(label)}")
            label = self.labels.index(label)
        elif isinstance(label, str):
            raise DataError(f"{row['place']}: label should be a number, as in training, got {show(label)}")
        ids = self.tokenizer(row["text"])["input_ids"]
        if len(ids) <= self.max_length:
            return Tokens(ids, label, Status.KEPT)
        # Cut by the tokenizer itself, which keeps the special tokens that it puts at the end.
        ids = self.tokenizer(row["text"], truncation=True, max_length=self.max_length)["input_ids"]
        return Tokens(ids, label, Status.TOO_LONG if self.drop_too_long else Status.CUT)

    def _document(self, row: dict[str, Any]) -> list[int]:
        before = [self.tokenizer.bos_token_id] if row["starts"] and self._bos else []
        after = [self.tokenizer.eos_token_id] if row["ends"] else []
        return [*before, *self._ids(row["text"]), *after]

    def _conversation(self, row: dict[str, Any]) -> tuple[list[int], list[bool], Note]:
        turns = json.loads(row["messages"])
        notes = Note(0)
        if self.kind == "pair" and not self.tokenizer.chat_template:
            question, completion = (turn["content"] for turn in turns)
            before = self._bos + question
            text = before + completion + self.tokenizer.eos_token
            spans: tuple[Span, ...] = ((len(before), len(text)),) if completion.strip() else ()
            if self.loss_on_all:
                spans = ((0, len(text)),)
        else:
            answers = find_answers(
                self.tokenizer,
                Conversation(tuple(map(_shown, turns)), tuple(json.loads(row["tools"]) or ()) or None),
                [turn.get("learn") for turn in turns],
                row["place"],
                loss_on_all=self.loss_on_all,
            )
            text, spans, notes = answers.text, answers.spans, answers.notes
        ids, loss = self._located(text, spans, row["place"])
        return ids, loss, notes if self.loss_on_all or self._ends(ids, loss) else notes | Note.NO_END

    def _ends(self, ids: list[int], loss: list[bool]) -> bool:
        """Whether each answer ends with a special token, blanks aside: else the model does not learn to stop."""
        for end, (learned, goes_on) in enumerate(pairwise([*loss, False])):
            if learned and not goes_on:
                said = takewhile(lambda i: loss[i], range(end, -1, -1))
                last = next((ids[i] for i in said if ids[i] in self._not_text or self._text([ids[i]]).strip()), None)
                if last not in self._not_text:
                    return False
        return True

    def _located(self, text: str, spans: Sequence[Span], place: str) -> tuple[list[int], list[bool]]:
        """Tokens of ``text``, and which of them lie in ``spans``.

        The text is cut where an answer begins and ends, and the parts are tokenised apart: no token then spans the end
        of a question and the start of an answer, which are never one token at inference. Where that would change the
        text (a tokenizer that begins every text with a space), tokens are located by offsets.
        """
        if list(spans) == [(0, len(text))]:
            ids = self._ids(text)
            return ids, [True] * len(ids)
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        parts = [self._ids(text[start:end]) for start, end in pairwise(edges)]
        ids = [token for part in parts for token in part]
        if len(parts) == 1 or self._text(ids) == text:
            ranges, start = [], 0
            for number, part in enumerate(parts):
                if number % 2:
                    ranges.append((start, start + len(part)))
                start += len(part)
        elif self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            # By order, not by overlap: the offsets of blanks may be empty.
            ranges = [
                (
                    next((i for i, (_, end) in enumerate(offsets) if end > first), len(ids)),
                    next((i for i, (start, _) in enumerate(offsets) if start >= last), len(ids)),
                )
                for first, last in spans
            ]
        else:
            raise DataError(f"{place}: this tokenizer does not say where its tokens lie; it has no fast version")
        loss = [False] * len(ids)
        for start, end in ranges:
            loss[start:end] = [True] * (end - start)
        return ids, loss

    @cached_property
    def _not_text(self) -> set[int]:
        return {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}

    @cached_property
    def _bos(self) -> str:
        return first_token(self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _shown(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as the template sees it: without ``learn``."""
    return {key: value for key, value in turn.items() if key != "learn"}


def first_token(tokenizer: Any) -> str:
    """The beginning-of-text token that the tokenizer puts before every text, if it does."""
    return tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("")["input_ids"] else ""


def prepare_tokenizer(tokenizer: Any, kind: Kind) -> None:
    """Set the chat template and end-of-text token that rows of this kind need.

    A tokenizer without a chat template gets :data:`INSTRUCTION_TEMPLATE` for conversations and keeps it: it is saved
    with the trained model, which is then prompted as it was trained. Pairs of texts need no template, they are simply
    joined.

    Raises:
        DataError: The tokenizer has no end-of-text token.
    """
    if kind == "classification":
        return
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token, so a model could not learn where an answer ends")
    if kind == "conversation" and not tokenizer.chat_template:
        tokenizer.chat_template = "{{ bos_token }}" * bool(first_token(tokenizer)) + INSTRUCTION_TEMPLATE


def fingerprint(tokenizer: Any) -> str:
    """A fingerprint, equal for tokenizers that make the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        rules.pop("padding"), rules.pop("truncation")  # of the last call
    known = [
        rules,
        str(tokenizer.chat_template),
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, *known], sort_keys=True).encode()).hexdigest()
