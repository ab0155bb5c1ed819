"""Answers to the questions of a benchmark that a judge scores: FastChat's files in and out, such as those of MT-bench."""

from __future__ import annotations

import math
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lisa_ds import jsonl
from lisa_ds.errors import ConfigError, DataError
from lisa_ds.models import reply

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
"""By category, as MT-bench has them."""

OTHER_TEMPERATURE = 0.7
"""Of a category that is not in :data:`TEMPERATURES`, as FastChat has it."""

MAX_NEW_TOKENS = 1024
"""Of each turn, as MT-bench has it."""


@dataclass(frozen=True)
class Question:
    """A conversation's questions, each asked after the answer to the one before."""

    key: int | str
    category: str
    turns: tuple[str, ...]
    required_temperature: float | None = None

    @property
    def temperature(self) -> float:
        """At which it is answered; 0 is greedy."""
        if self.required_temperature is not None:
            return self.required_temperature
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


def read_questions(path: Path) -> list[Question]:
    """The questions of a file of FastChat's format; ``reference`` and other fields are the judge's.

    Raises:
        DataError: The file cannot be read, a field is missing or malformed, or an id is given twice.
    """
    found: dict[int | str, Question] = {}
    for place, fields in jsonl.read(path):
        key, category, turns = (fields.get(name) for name in ("question_id", "category", "turns"))
        if isinstance(key, bool) or not isinstance(key, (int, str)):
            raise DataError(f"{place}: question_id should be a number or a text, got {key!r}")
        if key in found:
            raise DataError(f"{place}: question_id {key!r} is given twice")
        if not isinstance(category, str):
            raise DataError(f"{place}: category should be a text, got {category!r}")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{place}: turns should be a list of texts, got {turns!r}")
        temperature = fields.get("required_temperature")
        if temperature is not None and (not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf):
            raise DataError(f"{place}: required_temperature should be a number, 0 or more, got {temperature!r}")
        found[key] = Question(key, category, tuple(turns), temperature)
    if not found:
        raise DataError(f"{path}: holds no questions")
    return list(found.values())


def read_answers(path: Path, model_id: str) -> dict[int | str, dict[str, Any]]:
    """The answers that are in a file already, by question; empty if there is no file.

    Raises:
        DataError: It holds something else.
        ConfigError: They are of another model.
    """
    found = {}
    for place, fields in jsonl.read(path) if path.exists() else ():
        if not {"question_id", "model_id", "choices"} <= fields.keys():
            raise DataError(f"{place}: is no answer, and the file is not written over; choose another --out")
        if fields["model_id"] != model_id:
            raise ConfigError(
                f"--out: {place} is an answer of {fields['model_id']!r}, and this model is {model_id!r}; choose another file, or say "
                "--model-id"
            )
        found[fields["question_id"]] = fields
    return found


def check_template(tokenizer: Any, name: str) -> None:
    """Refuse a model that has no chat template: questions have several turns.

    Raises:
        ConfigError: It has none.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"--answers: the tokenizer of {name} has no chat template to put several turns into; set data.chat_template=FILE.jinja"
        )


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    out: Path,
    *,
    model_id: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    tell: Callable[[str], None] = print,
) -> int:
    """Answer the questions that ``out`` does not answer yet; the file is complete after each.

    A question is answered alike whether or not others were answered before: each has a seed of its own.

    Args:
        model: In evaluation mode.
        tokenizer: With a chat template.
        questions: Of :func:`read_questions`.
        out: The file of answers.
        model_id: What the judge calls the model.
        max_new_tokens: Of each turn.
        tell: Says how far it is.

    Returns:
        How many were answered now.

    Raises:
        LisaError: As :func:`read_answers`; or a conversation fills the model's table of positions.
    """
    answers = read_answers(out, model_id)
    left = [question for question in questions if question.key not in answers]
    if len(left) < len(questions):
        tell(f"{len(questions) - len(left)} of {len(questions)} questions are answered already in {out}")
    order = {question.key: number for number, question in enumerate(questions)}
    start = time.monotonic()
    for number, question in enumerate(left, start=1):
        turns = _answer(model, tokenizer, question, max_new_tokens)
        answers[question.key] = {
            "question_id": question.key,
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
        jsonl.write(out, sorted(answers.values(), key=lambda each: order.get(each["question_id"], len(order))))
        seconds = (time.monotonic() - start) / number * (len(left) - number)
        tell(f"question {number} of {len(left)} ({question.category}) answered, about {_spoken(seconds)} left")
    return len(left)


def _answer(model: Any, tokenizer: Any, question: Question, max_new_tokens: int) -> list[str]:
    torch.manual_seed(zlib.crc32(str(question.key).encode()))
    said: list[dict[str, str]] = []
    for turn in question.turns:
        said.append({"role": "user", "content": turn})
        text = reply(model, tokenizer, said, max_new_tokens=max_new_tokens, temperature=question.temperature)
        said.append({"role": "assistant", "content": text})
    return [turn["content"] for turn in said if turn["role"] == "assistant"]


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
