"""The rows of our own tasks, read from local files, and how an answer is scored.

``lm_eval`` calls ``gsm8k`` and ``pubmedqa`` with the settings of all tasks: those that they know, and others.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets

from lisa_ds import jsonl
from lisa_ds.errors import DataError

DECISIONS = ("yes", "no", "maybe")

_log = logging.getLogger(__name__)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k(*, data_dir: str = "", num_examples: int | None = None, **others: Any) -> dict[str, datasets.Dataset]:
    """``asked`` and ``examples`` of GSM8K, with ``question``, ``worked`` (the answer in steps) and ``number``.

    Args:
        data_dir: Holds ``train.jsonl``, whose first rows are the examples, and ``test.jsonl``; or its folder ``gsm8k`` does. Without
            ``test.jsonl`` the rows behind the examples are asked.
        num_examples: How many examples; the task's own number if None.
        others: Settings of other tasks.

    Raises:
        DataError: A file is missing, or holds something else.
    """
    number = 8 if num_examples is None else num_examples
    train = _file(data_dir, "gsm8k", "train.jsonl")
    examples = [_problem(fields, place) for place, fields in jsonl.read(train)]
    test = train.with_name("test.jsonl")
    if test.is_file():
        asked = [_problem(fields, place) for place, fields in jsonl.read(test)]
    else:
        asked = examples[number:]
        _log.warning(
            "gsm8k_cot_local: there is no %s, so rows of train.jsonl are asked: a model that trained on them knows them",
            test,
        )
    return _split(asked, examples, number, train)


def score_gsm8k(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the last number of the answer is the row's."""
    found = last_number(results[0])
    return {"exact_match": float(found is not None and found == last_number(row["number"]))}


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separated by commas or not; None if there is none.

    Example:
        >>> last_number("2 + 1 = 3. So they earn $1,203.50.")
        Decimal('1203.50')
    """
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def pubmedqa(*, data_dir: str = "", num_examples: int | None = None, **others: Any) -> dict[str, datasets.Dataset]:
    """``asked`` and ``examples`` of PubMedQA, with ``abstract``, ``question`` and ``decision``.

    Args:
        data_dir: Holds ``ori_pqal.json``, or its folder ``pubmedqa`` does. If ``test_ground_truth.json`` lies beside it, the rows that
            it names are asked and examples are of the others; else the first rows are the examples.
        num_examples: How many examples; the task's own number if None.
        others: Settings of other tasks.

    Raises:
        DataError: A file is missing, or holds something else.
    """
    number = 5 if num_examples is None else num_examples
    file = _file(data_dir, "pubmedqa", "ori_pqal.json")
    rows = {pmid: _abstract(fields, f"{file}: {pmid}") for pmid, fields in _json_object(file).items()}
    official = file.with_name("test_ground_truth.json")
    if official.is_file():
        named = _json_object(official)
        if missing := sorted(named.keys() - rows.keys()):
            raise DataError(f"{official}: names {missing[0]!r}, which {file} does not have")
        asked = [row for pmid, row in rows.items() if pmid in named]
        examples = [row for pmid, row in rows.items() if pmid not in named]
    else:
        examples = list(rows.values())
        asked = examples[number:]
    return _split(asked, examples, number, file)


def _split(
    asked: list[dict[str, str]], examples: list[dict[str, str]], number: int, file: Path
) -> dict[str, datasets.Dataset]:
    if len(examples) < number or not asked:
        raise DataError(f"{file}: has {len(examples)} rows, too few for {number} examples and a row to ask")
    kept = examples[: max(1, number)]  # a data set of no rows has no columns
    return {"asked": datasets.Dataset.from_list(asked), "examples": datasets.Dataset.from_list(kept)}


def _problem(fields: Any, place: str) -> dict[str, str]:
    question, answer = _text(fields, "question", place), _text(fields, "answer", place)
    worked, mark, number = _CALCULATOR.sub("", answer).partition("####")
    if not mark or last_number(number) is None:
        raise DataError(f"{place}: answer should end with '#### ' and a number, got {answer[-40:]!r}")
    return {
        "question": question,
        "worked": f"{worked.strip()} The answer is {number.strip()}.",
        "number": number.strip(),
    }


def _abstract(fields: Any, place: str) -> dict[str, str]:
    question, decision = _text(fields, "QUESTION", place), _text(fields, "final_decision", place)
    contexts = fields.get("CONTEXTS")
    if not isinstance(contexts, list) or not all(isinstance(text, str) for text in contexts):
        raise DataError(f"{place}: CONTEXTS should be a list of texts")
    if decision not in DECISIONS:
        raise DataError(f"{place}: final_decision should be one of {', '.join(DECISIONS)}, got {decision!r}")
    return {"abstract": "\n".join(contexts), "question": question, "decision": decision}


def _text(fields: Any, name: str, place: str) -> str:
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} should be a text, got {value!r}")
    return value


def _file(data_dir: str, folder: str, name: str) -> Path:
    place = Path(data_dir).expanduser()
    for file in (place / name, place / folder / name):
        if file.is_file():
            return file
    raise DataError(f"--data-dir: neither {place / name} nor {place / folder / name} is there")


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(jsonl.text(file))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: should hold an object by ids, got {type(found).__name__}")
    return found
