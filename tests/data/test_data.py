"""Rows of every form become the right tokens, held out by what they say, tokenised once and batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_ds.config import DataConfig
from lisa_ds.data import collator, describe, label_names, load_dataset, num_labels, preview
from lisa_ds.data.tokenise import IGNORED, Tokeniser
from lisa_ds.errors import DataError
from tests.data.chatml import PAIRS, bpe, load, tokenizer, turns, uncased, write
from tests.data.rows import fresh_cache

__all__ = ["bpe", "fresh_cache", "tokenizer", "uncased"]

# --- forms ----------------------------------------------------------------------------------------------------------

CONVERSATION = "<|im_start|>user\nwhat\n\nthis<|im_end|>\n<|im_start|>assistant\n⟦seven<|im_end|>⟧\n"
WITH_SYSTEM = "<|im_start|>system\nbe brief<|im_end|>\n" + CONVERSATION


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "what", "input": "this", "output": "seven"}, CONVERSATION),
        ({"instruction": "what\n\nthis", "input": "", "output": "seven", "id": 3}, CONVERSATION),
        ({"instruction": "what\n\nthis", "input": None, "output": "seven"}, CONVERSATION),
        ({"instruction": "what\n\nthis", "output": "seven", "system": "be brief"}, WITH_SYSTEM),
        ({"messages": turns("what\n\nthis", "seven")}, CONVERSATION),
        ({"messages": [{"role": "system", "content": "be brief"}, *turns("what\n\nthis", "seven")]}, WITH_SYSTEM),
        ({"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns("what\n\nthis", "seven")]}, CONVERSATION),
        ({"conversations": [{"from": "human", "value": "what\n\nthis"}, {"from": "gpt", "value": "seven"}]}, CONVERSATION),
        ({"conversations": [{"from": "human", "value": "what\n\nthis"}, {"from": "gpt", "value": "seven"}], "system": "be brief"}, WITH_SYSTEM),
        ({"prompt": "what\n\nthis", "completion": "seven"}, CONVERSATION),
        ({"prompt": turns("what\n\nthis"), "completion": "seven"}, CONVERSATION),
        ({"prompt": turns("what\n\nthis"), "completion": [{"role": "assistant", "content": "seven"}]}, CONVERSATION),
        ({"text": "what is it"}, "⟦what is it<|im_end|>⟧"),
    ],
)  # fmt: skip
def test_a_row_of_every_form(row: dict[str, Any], text: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = load(write(tmp_path / "rows.jsonl", row), tokenizer)
    assert [preview(row, tokenizer) for row in rows] == [text]


def test_columns_are_renamed(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "gsm.jsonl", {"question": "what\n\nthis", "answer": "seven", "prompt": 1})
    (row,) = load(path, tokenizer, columns={"question": "prompt", "answer": "completion"})
    assert preview(row, tokenizer) == CONVERSATION


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "q", "answer": "a"}, {}, "set data.columns: {question: prompt, answer: completion}\n"),
        ({"instruction": "q", "response": "a"}, {}, "set data.columns: {response: output}\n"),
        ({"x": 1, "y": 2}, {}, "no accepted form has the columns 'x', 'y'\nAccepted columns:\n  alpaca: "),
        ({"text": "t"}, {"format": "alpaca"}, "data.format is 'alpaca', but no accepted form has the columns 'text'"),
        ({"text": "t"}, {"columns": {"txt": "text"}}, "data.columns renames 'txt'; found 'text'"),
        ({"instruction": "q", "output": 3}, {}, "output should be text, got 3"),
        ({"messages": []}, {}, "messages should be a list of turns with 'role' and 'content', got []"),
        ({"messages": [{"role": "user"}]}, {}, "messages[0] should be a turn with 'role' and 'content', got {'role': 'user'}"),
        ({"messages": [{"role": "bot", "content": "x"}]}, {}, "messages[0].role should be one of system, developer, user, human, assistant, gpt, function_call, tool_call, tool, function, observation, tool_response, got 'bot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "messages[0].content[0].type is 'image', and only text is read; give thoughts as reasoning_content and calls as tool_calls, and leave out rows about pictures and sounds"),
        ({"prompt": "q", "completion": None}, {}, "completion should be text, got None"),
        ({"text": None}, {}, "text should be text, got None"),
        ({"text": "t", "label": "x"}, {}, "rows are classification, but model.task is 'causal_lm'; set model.task: sequence_classification, or data.format: text"),
        ({"prompt": "q", "completion": "a"}, {"packing": True}, "rows are prompt_completion, but data.packing joins plain texts"),
        ({"prompt": "q", "completion": " "}, {}, "no row is left: 1 have nothing to learn within data.max_length 1024"),
        ({"text": "a single token is predicted by nothing"}, {"max_length": 1}, "1 have nothing to learn within data.max_length 1"),
        ({"prompt": "q", "completion": "a"}, {"max_length": 5}, "no row is left: 1 have nothing to learn within data.max_length 5"),
        ({"prompt": "q", "completion": "a"}, {"max_length": 5, "on_too_long": "drop"}, "no row is left: 1 are longer than data.max_length 5"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used(
    row: Any, options: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, **options)
    assert message in str(caught.value)
    assert str(caught.value).startswith(path)
    assert not [entry for entry in (tmp_path / "cache" / "data").glob("*") if entry.is_dir()]  # nothing half-built


def test_a_later_row_of_another_form_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "completion": "a"}, {"text": "t"})
    with pytest.raises(DataError, match=r"rows.jsonl:2: is without 'prompt', 'completion', while the rows before are"):
        load(path, tokenizer)


# --- held-out rows --------------------------------------------------------------------------------------------------


def splits(path: str, tokenizer: Any, **options: Any) -> tuple[set[str], set[str]]:
    train, test = load_dataset(DataConfig(path=path, **options), tokenizer)
    assert test is not None
    return ({preview(row, tokenizer) for row in train}, {preview(row, tokenizer) for row in test})


def test_rows_are_held_out_by_what_they_say(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *PAIRS, *PAIRS)
    train, test = splits(path, tokenizer, eval_fraction=0.3)
    assert not train & test  # a row and its double stay together
    assert len(train | test) == 40
    assert 4 <= len(test) <= 20

    more = write(tmp_path / "more.jsonl", *({"prompt": f"new {i}", "completion": "a"} for i in range(20)), *PAIRS[::-1])
    train_of_more, test_of_more = splits(more, tokenizer, eval_fraction=0.3)
    assert test <= test_of_more  # new rows move no old one
    assert train <= train_of_more
    assert splits(path, tokenizer, eval_fraction=0.3, seed=1)[1] != test
    assert splits(path, tokenizer, eval_fraction=0.3, eval_max_rows=3)[1] < test
    assert len(load(path, tokenizer, max_rows=7)) == 7


def test_held_out_rows_of_another_file(tmp_path: Path, tokenizer: Any) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", *rows) for i, rows in enumerate((PAIRS[:30], PAIRS[30:]))]
    train, test = splits(paths[0], tokenizer, eval_path=paths[1])
    assert (len(train), len(test)) == (30, 10)


def test_a_share_that_holds_out_nothing(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *PAIRS[:3])
    with pytest.raises(DataError, match=r"data.eval_fraction holds out none of its 3 rows"):
        load(path, tokenizer, eval_fraction=1e-6)


# --- classification -------------------------------------------------------------------------------------------------

REVIEWS = [{"text": f"film {i}", "label": ("good", "bad", "it")[i % 3]} for i in range(9)]


@pytest.mark.parametrize(
    ("rows", "names", "labels"),
    [
        (REVIEWS, ["bad", "good", "it"], [1, 0, 2]),
        ([{"text": row["text"], "label": i % 3} for i, row in enumerate(REVIEWS)], None, [0, 1, 2]),
        ([{"text": row["text"], "label": str(i % 3)} for i, row in enumerate(REVIEWS)], None, [0, 1, 2]),
    ],
)
def test_classes(rows: Any, names: Any, labels: list[int], tmp_path: Path, uncased: Any) -> None:
    config = DataConfig(path=write(tmp_path / "rows.jsonl", *rows), eval_path=write(tmp_path / "e.jsonl", *rows[1:]))
    train, test = load_dataset(config, uncased, task="sequence_classification")
    assert test is not None
    assert (label_names(train), num_labels(train)) == (names, 3)
    assert (train["labels"][:3], test["labels"][:2]) == (labels, labels[1:])
    assert uncased.decode(train[0]["input_ids"]) == "[CLS] film [UNK] [SEP]"
    batch = collator(uncased, task="sequence_classification")([train[0], train[1]])
    assert batch["labels"].tolist() == labels[:2]


@pytest.mark.parametrize(
    ("labels", "held_out", "message"),
    [
        (["good", "bad"], ["ugly"], r"e.jsonl:1: label should be one of bad, good, got 'ugly'"),
        ([0, 1], ["good"], r"e.jsonl:1: label should be a number, as in training, got 'good'"),
        ([0, "good"], [0], r"label is a name in some rows \('good'\) and a number in others \(0\)"),
        ([-1, 0], [0], r"label should be a name or a number from 0, got -1"),
        ([0, 1.5], [0], r"rows.jsonl:2: label should be a number or a name, got 1.5"),
    ],
)
def test_labels_that_do_not_fit(labels: Any, held_out: Any, message: str, tmp_path: Path, uncased: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *({"text": "film", "label": label} for label in labels))
    eval_path = write(tmp_path / "e.jsonl", *({"text": "film", "label": label} for label in held_out))
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig(path=path, eval_path=eval_path), uncased, task="sequence_classification")


# --- once on a machine ----------------------------------------------------------------------------------------------


def test_rows_are_tokenised_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", *PAIRS)
    first = load(path, tokenizer)[:]
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=9)  # what it was used for last does not count

    tokenised: list[int] = []
    monkeypatch.setattr(Tokeniser, "row", lambda *_: tokenised.append(1) or ([1, 2], [1, 2], 0, 0))
    assert load(path, tokenizer)[:] == first
    assert load(path, tokenizer, num_workers=2)[:] == first
    assert not tokenised
    load(path, tokenizer, max_length=77)
    write(tmp_path / "rows.jsonl", *PAIRS[1:])
    load(path, tokenizer)
    tokenizer.chat_template += " "
    load(path, tokenizer)
    assert len(tokenised) == 40 + 39 + 39


def test_several_processes_tokenise_the_same(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *PAIRS * 60)
    one = load(path, tokenizer)[:]
    for entry in (tmp_path / "cache" / "data").iterdir():
        entry.rename(tmp_path / entry.name)
    assert load(path, tokenizer, num_workers=2)[:] == one


# --- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_keeps_the_loss_on_the_end_of_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 9})
    rows = load(path, tokenizer)
    batch = collator(tokenizer, pad_to_multiple_of=8)(list(rows))
    assert batch["input_ids"].shape[1] % 8 == 0
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # so that a pad cannot be told from an end by its number
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"]
        assert labels.tolist() == row["labels"] + [IGNORED] * (len(labels) - length)
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert tokenizer.eos_token_id in labels
    assert batch["labels"].dtype == torch.int64


def test_rows_are_described(tmp_path: Path, tokenizer: Any) -> None:
    rows = load(write(tmp_path / "rows.jsonl", {"text": "ab"}, {"text": "abcd"}), tokenizer)
    lengths = [len(row["input_ids"]) for row in rows]
    assert describe(rows) == f"2 rows, {sum(lengths)} tokens ({sum(lengths)} with loss), longest {max(lengths)}"
    assert describe(rows.select([0])).startswith("1 rows, ")
