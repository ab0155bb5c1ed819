"""Answers of a run's model before and after training, to the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lisa_ds import jsonl
from lisa_ds.errors import DataError
from lisa_ds.models import answer
from lisa_ds.run_log import SAMPLES


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: ``prompt`` of each object of a ``.jsonl``, else each line that is not empty.

    Raises:
        DataError: The file cannot be read, or holds none.
    """
    if path.suffix == ".jsonl":
        found = []
        for place, fields in jsonl.read(path):
            if not isinstance(fields.get("prompt"), str):
                raise DataError(f"{place}: prompt should be a text, got {fields.get('prompt')!r}")
            found.append(fields["prompt"])
    else:
        found = [line.strip() for _, line in jsonl.lines(path)]
    if not found:
        raise DataError(f"{path}: holds no prompts")
    return found


def ask(
    before: Callable[[], Any], after: Callable[[], Any], tokenizer: Any, prompts: list[str], max_new_tokens: int
) -> list[dict[str, str]]:
    """The greedy answers of two models, one loaded at a time.

    Args:
        before: Loads the model before training.
        after: Loads the trained model.
        tokenizer: The trained model's, with the chat template that it was trained with: both are asked in the same words.
        prompts: What is asked.
        max_new_tokens: Of each answer.
    """
    said = []
    for load in (before, after):
        model = load()
        said.append([answer(model, tokenizer, prompt, max_new_tokens) for prompt in prompts])
        del model  # before the next is loaded
    return [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, *said, strict=True)]


def write(run: Path, samples: list[dict[str, str]]) -> Path:
    """Write them to the run's directory, in the place of those before, and return the file's path.

    A line is ``{"prompt", "before", "after"}``.
    """
    jsonl.write(run / SAMPLES, samples)
    return run / SAMPLES
