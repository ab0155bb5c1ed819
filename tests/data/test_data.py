"""Rows of every form become the right tokens, with loss on the answers and nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lisa_ds.config import DataConfig
from lisa_ds.data import collator, describe, label_names, load_dataset, num_labels, preview, stdlib_docs
from lisa_ds.data.files import read_rows
from lisa_ds.data.tokenise import IGNORED, Tokeniser
from lisa_ds.errors import DataError
from tests.train.builtin import shared_data, smollm2

# As SmolLM2's: nothing marks an answer, and a line break follows the token that ends a turn.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}",
)
# As Qwen3's: only the last turn shows its thoughts.
THINKING = CHATML.replace(
    "message['content'] + '<|im_end|>\n'",
    "('<think>' + message['content'].split('</think>')[0].split('<think>')[-1].strip() + '</think>'"
    " if loop.last and message['role'] == 'assistant' else '')"
    " + message['content'].split('</think>')[-1].lstrip() + '<|im_end|>\n'",
)
# Writes what was said before behind what is said now: what was asked does not go before the answer.
BACKWARDS = CHATML.replace("in messages", "in messages | reverse")
# Refuses what is not strictly by turns, as Llama 2's and Gemma's do.
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must start with user') }}{% endif %}" + CHATML

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Bytes, and merges of letters and of line breaks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["\n\n\n\n"] * 9 + ["the answer is seven"] * 9, trainer)
    return tokenizer


@pytest.fixture
def tokenizer(bpe: Tokenizer) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture
def base_tokenizer(bpe: Tokenizer) -> Any:
    """Of a base model: no chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture
def uncased() -> Any:
    """Loses case and spacing, so that what it decodes is not what it was given; adds [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>"]
    words = [*special, "user", "assistant", "what", "is", "it", "seven", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]")


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path: str | Path, tokenizer: Any, **options: Any) -> datasets.Dataset:
    return load_dataset(DataConfig(path=str(path), **options), tokenizer)[0]


def learned(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """The stretches of text that carry loss."""
    return [part.partition("⟧")[0] for part in preview(row, tokenizer).split("⟦")[1:]]


def as_stored(messages: list[dict[str, str]]) -> dict[str, str]:
    """A row as the tokeniser is given it."""
    return {"messages": json.dumps(messages), "tools": "null", "place": "here"}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]


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


# --- files ----------------------------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"question {i}", "completion": f"the answer is {i}"} for i in range(40)]


def save_as(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text(
            "\n".join(separator.join(f'"{v}"' for v in row) for row in [rows[0], *(r.values() for r in rows)])
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".jsonl":  # with what editors leave: a byte-order mark, blank lines, line ends of Windows
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.csv", "a.tsv", "saved"])
def test_files_of_every_kind_hold_the_same_rows(name: str, tmp_path: Path, tokenizer: Any) -> None:
    expected = load(write(tmp_path / "plain.jsonl", *PAIRS), tokenizer)[:]
    assert load(save_as(tmp_path / name, PAIRS), tokenizer)[:] == expected


def test_json_lines_under_the_name_of_json(tmp_path: Path, tokenizer: Any) -> None:
    assert len(load(write(tmp_path / "rows.json", *PAIRS), tokenizer)) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', ":2: not valid JSON: Expecting ',' delimiter (column "),
        ("a.jsonl", b'{"text": "x"}\n\n["y"]\n', ":3: should be an object with columns, got list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ":2: not UTF-8 (invalid start byte at byte 11 of the line)"),
        (
            "a.jsonl",
            b'{"text": "x\\ud83d"}\n',
            r":1: text should be valid Unicode (character 2 is half of a pair), got 'x\ud83d'",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            ":1: messages[0].content should be valid Unicode",
        ),
        ("a.json", b'[{"text": "x"},\n{"text" "y"}]', ":2: not valid JSON: Expecting ':' delimiter (column 9)"),
        ("a.json", b'[{"text": "x"}, 7]', ": row 2: should be an object with columns, got int"),
        ("a.csv", b"text,note\nx,1\ny\n", ":3: should have 2 fields, as the header does"),
        ("a.csv", b'text\n"x\n', ":1: not valid CSV: unexpected end of data"),
        ("a.parquet", b"PAR1 no", ": not a valid parquet file: "),
        ("a.txt", b"ab\xff", ":1: not UTF-8 (invalid start byte at byte 3 of the line)"),
        ("a.jsonl", b"\n", ": holds no rows"),
        ("a.json", b"[]", ": holds no rows"),
        ("a.txt", b"\n\n", ": holds no rows"),
        ("a.xlsx", b"", ": should be one of .json, .jsonl, .parquet, .txt, .csv, .tsv, got .xlsx"),
    ],
)
def test_a_malformed_file_names_file_and_line(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("trian.jsonl", {}, "no such file or directory: {tmp}/trian.jsonl (looked from {cwd}); did you mean '{tmp}/train.jsonl'?"),
        ("no/such/rows", {}, "no such file or directory: {tmp}/no/such/rows (looked from {cwd}); there is no directory {tmp}/no/such"),
        ("train.jsonl", {"eval_split": "test"}, "eval_split: {tmp}/train.jsonl is a single file and has no split 'test'"),
        ("folder", {"split": "dev"}, "no file of split 'dev' in {tmp}/folder; found data/train-0.jsonl, test.jsonl"),
        ("broken", {}, "path: {tmp}/broken holds a saved data set that cannot be read: "),
        ("empty", {}, "no .json, .jsonl, .parquet, .txt, .csv, .tsv file in {tmp}/empty"),
    ],
)  # fmt: skip
def test_data_that_is_not_there(
    path: str, options: dict[str, str], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    for name in ("train.jsonl", "folder/test.jsonl", "folder/data/train-0.jsonl"):
        write(tmp_path / name, *PAIRS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{}")
    with pytest.raises(DataError) as caught:
        load(tmp_path / path, tokenizer, **options)
    assert message.format(tmp=tmp_path, cwd=Path.cwd()) in str(caught.value)


def test_splits_of_a_directory(tmp_path: Path, tokenizer: Any) -> None:
    for name, rows in {
        "test.jsonl": PAIRS[:3],
        "a.jsonl": PAIRS[3:8],
        "more/b.jsonl": PAIRS[8:],
        ".x.jsonl": [{}],
    }.items():
        write(tmp_path / "d" / name, *rows)
    train, test = load_dataset(DataConfig(path=str(tmp_path / "d"), eval_split="test"), tokenizer)
    assert test is not None
    assert (len(train), len(test)) == (37, 3)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    asked = []

    def from_hub(*names: str | None, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        if split == "test":
            raise ValueError("Unknown split 'test'.\nShould be one of ['train'].")
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    assert len(load("some/set:main", tokenizer)) == 40
    with pytest.raises(
        DataError, match=r"no such file .*hub has no such data set either: Unknown split 'test'. Should"
    ):
        load("some/set", tokenizer, split="test")
    assert asked == [("some/set", "main", "train"), ("some/set", None, "test")]


# --- loss on the answers --------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one turn": [*turns("what is it", "the answer is seven")],
    "three turns": turns("a", "one", "b", "two\n\ntwo", "c", "three"),
    "system": [{"role": "system", "content": "be brief"}, *turns("a", "b")],
    "no question": [{"role": "user", "content": ""}, {"role": "assistant", "content": "seven"}],
    "unicode": turns("Grüße 🦙?", "naïve 日本語 👩‍👩‍👧 ok"),
    "answer starts with line breaks": turns("a", "\n\nb", "c", "\n\nd "),
    "answer holds the question": turns("seven", "seven seven", "seven", "seven"),
    "answer holds a template's words": turns("a", "<|im_start|>assistant\nb<|im_end|>\nc"),
    "ends with a question": turns("a", "b", "c"),
    "nothing was asked yet": [{"role": "assistant", "content": "hello"}, *turns("a", "b")],
}


def expected_answers(messages: list[dict[str, str]]) -> list[str]:
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return [message["content"] for message in messages[first:] if message["role"] == "assistant"]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_loss_is_on_the_answers_token_by_token(which: str, messages: list[dict[str, str]], tokenizer: Any) -> None:
    if which == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
    ids, labels, *_ = Tokeniser(tokenizer, "conversation", 1024).row(as_stored(messages))

    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    learned = [i for i, label in enumerate(labels) if label != IGNORED]
    assert [labels[i] for i in learned] == [ids[i] for i in learned]
    runs = [run for run in "".join("x" if i in set(learned) else " " for i in range(len(ids))).split(" ") if run]
    answers, at = [], 0
    for run in runs:
        answers.append(tokenizer.decode([ids[i] for i in learned[at : at + len(run)]]))
        at += len(run)
    assert answers == [f"{answer}<|im_end|>" for answer in expected_answers(messages)]

    # What precedes an answer is, token by token, what the model will see when it is asked.
    asked = next(i for i, message in enumerate(messages) if message["role"] == "user") + 1
    prompt = tokenizer.apply_chat_template(messages[:asked], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: learned[0]] == prompt


def test_marks_of_a_template_are_followed(tokenizer: Any) -> None:
    messages = CONVERSATIONS["three turns"]
    rows = []
    for template in (CHATML, MARKED):
        tokenizer.chat_template = template
        rows.append(Tokeniser(tokenizer, "conversation", 1024).row(as_stored(messages)))
    assert rows[0] == rows[1]


def test_a_template_that_hides_earlier_thoughts(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    messages = turns("a", "<think>hm</think>\n\none", "b", "<think>ho</think>two")
    ids, labels, *_ = Tokeniser(tokenizer, "conversation", 1024).row(as_stored(messages))
    row = {"input_ids": ids, "labels": labels}
    assert learned(row, tokenizer) == ["one<|im_end|>", "<think>ho</think>two<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (BACKWARDS, turns("a", "b"), r"chat template does not let turn 2 \(assistant\) be told from the rest of the"),
        (STRICT, turns("a", "b")[1:], "chat template refuses this conversation: must start with user; set data.chat_t"),
    ],
)
def test_a_template_that_does_not_fit(
    template: str, messages: Any, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
        load(write(tmp_path / "rows.jsonl", {"messages": messages}), tokenizer)


def test_a_tokenizer_that_loses_text_is_followed_by_offsets(uncased: Any) -> None:
    uncased.chat_template, uncased.eos_token = CHATML, "<|im_end|>"
    messages = turns("What is it", "SEVEN", "what", "Good film")
    ids, labels, *_ = Tokeniser(uncased, "conversation", 1024).row(as_stored(messages))
    text = "<|im_start|> user what is it <|im_end|> <|im_start|> assistant⟦seven <|im_end|>⟧"
    text += "<|im_start|> user what <|im_end|> <|im_start|> assistant⟦good film <|im_end|>⟧"
    assert preview({"input_ids": ids, "labels": labels}, uncased) == text


def test_without_a_template_a_layout_is_given_and_kept(tmp_path: Path, base_tokenizer: Any) -> None:
    rows = {"instruction": "what", "input": "this", "output": "seven", "system": "be brief"}
    (row,) = load(write(tmp_path / "rows.jsonl", rows), base_tokenizer)
    assert preview(row, base_tokenizer) == (
        "be brief\n\n### Instruction:\nwhat\n\nthis\n\n### Response:\n⟦seven<|endoftext|>⟧"
    )
    asked = base_tokenizer.apply_chat_template(turns("what"), tokenize=False, add_generation_prompt=True)
    assert asked == "### Instruction:\nwhat\n\n### Response:\n"


def test_without_a_template_prompt_and_completion_are_joined(tmp_path: Path, base_tokenizer: Any) -> None:
    (row,) = load(write(tmp_path / "rows.jsonl", {"prompt": "2 + 5 =", "completion": " seven"}), base_tokenizer)
    assert preview(row, base_tokenizer) == "2 + 5 =⟦ seven<|endoftext|>⟧"
    assert base_tokenizer.chat_template is None


def test_a_tokenizer_that_begins_texts_with_a_token(tmp_path: Path, bpe: Tokenizer) -> None:
    copy = Tokenizer.from_str(bpe.to_str())
    copy.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    first = PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<|im_start|>", eos_token="<|endoftext|>")
    path = write(tmp_path / "pair.jsonl", {"prompt": "2 + 5 =", "completion": " seven"})
    assert [preview(row, first) for row in load(path, first)] == ["<|im_start|>2 + 5 =⟦ seven<|endoftext|>⟧"]
    path = write(tmp_path / "text.jsonl", {"text": "seven"})
    assert [preview(row, first) for row in load(path, first)] == ["⟦<|im_start|>seven<|endoftext|>⟧"]
    path = write(tmp_path / "alpaca.jsonl", {"instruction": "what", "output": "seven"})
    assert preview(load(path, first)[0], first).startswith("<|im_start|>### Instruction:\nwhat")


def test_loss_on_all(tmp_path: Path, tokenizer: Any) -> None:
    (row,) = load(write(tmp_path / "rows.jsonl", {"messages": turns("a", "b")}), tokenizer, loss_on="all")
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(
    ("on_too_long", "kept", "report"),
    [("truncate", 2, "of 3 rows, 1 cut at data.max_length 60; 1 dropped, nothing to learn"), ("drop", 1, "2 dropped")],
)
def test_long_rows(
    on_too_long: str, kept: int, report: str, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [("a", "b"), ("a", "b" * 90), ("a" * 90, "b")]
    path = write(tmp_path / "rows.jsonl", *({"prompt": p, "completion": c} for p, c in pairs))
    for _ in range(2):  # what was lost is said again when the rows come from the cache
        caplog.clear()
        rows = load(path, tokenizer, max_length=60, on_too_long=on_too_long)
        assert len(rows) == kept
        assert max(map(len, rows["input_ids"])) <= 60
        assert report in caplog.text


# --- plain text -----------------------------------------------------------------------------------------------------


def test_packing_joins_texts_and_cuts_blocks(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"text number {i} says {'ha' * i}" for i in range(30)]
    path = write(tmp_path / "rows.jsonl", *({"text": text} for text in texts))
    rows = load(path, tokenizer, packing=True, max_length=64)
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert [token for row in rows for token in row["input_ids"]] == stream
    assert [len(row["input_ids"]) for row in rows][:-1] == [64] * (len(stream) // 64)
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_a_text_file_is_one_document_in_pieces(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(f"Paragraph {i}, " + "word " * 60 + "\n" * (1 + i % 3) for i in range(50)) + "end"
    (tmp_path / "book.txt").write_text(text)
    pieces = list(read_rows(tmp_path / "book.txt"))
    assert len(pieces) > 5
    assert "".join(piece.fields["text"] for piece in pieces) == text
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    rows = load(tmp_path / "book.txt", tokenizer, packing=True, max_length=100)
    assert tokenizer.decode([token for row in rows for token in row["input_ids"]]) == text + "<|im_end|>"


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


# --- the built-in corpus --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("docs")
    stdlib_docs.write(directory)
    return directory


def test_the_standard_library_is_a_corpus(docs: Path) -> None:
    train, test = ([json.loads(line) for line in (docs / f"{split}.jsonl").open()] for split in stdlib_docs.SPLITS)
    assert len(train) > 3000
    assert 0.02 < len(test) / len(train) < 0.2
    packages = {
        entry.question: entry.module.partition(".")[0] for entry in stdlib_docs._entries(Path(os.__file__).parent)
    }
    assert not {packages[row["instruction"]] for row in train} & {packages[row["instruction"]] for row in test}
    answers = [row["output"] for row in train + test]
    assert len(set(answers)) == len(answers)  # nothing held out can be learned by heart
    assert max(map(len, answers)) <= 600
    dedent = next(row for row in train + test if "textwrap.dedent" in row["instruction"])
    assert dedent["instruction"] == "What does `textwrap.dedent(text)` do in Python?"
    assert dedent["output"].startswith("Remove any common leading whitespace from every line in `text`.\n\n")
    questions = " ".join(row["instruction"] for row in train + test)
    assert "`collections.Counter.most_common(n=None)`" in questions
    assert "the class `pathlib.Path`" in questions


@pytest.mark.more
def test_the_corpus_is_the_same_each_time(docs: Path, tmp_path: Path) -> None:
    stdlib_docs.write(tmp_path)
    for split in stdlib_docs.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (docs / f"{split}.jsonl").read_bytes()


def test_the_corpus_under_its_name(docs: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_docs, "corpus", lambda: docs)
    config = DataConfig(path="builtin:stdlib-docs", eval_split="test", max_rows=50, eval_max_rows=20)
    train, test = load_dataset(config, tokenizer)
    assert test is not None
    assert (len(train), len(test)) == (50, 20)
    assert learned(train[0], tokenizer)[0].endswith("<|im_end|>")
    for path, split, message in [
        ("builtin:stdlib", "train", "no such built-in data set: 'builtin:stdlib'; there is 'builtin:stdlib-docs'"),
        ("builtin:stdlib-docs", "dev", "has the splits train and test, got 'dev'"),
    ]:
        with pytest.raises(DataError, match=message):
            load(path, tokenizer, split=split)


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gsm8k/train.jsonl", {"columns": {"question": "prompt", "answer": "completion"}}),
        ("codealpaca/code_alpaca_2k.json", {}),
        ("gpteacher/roleplay-simple-deduped.json", {"columns": {"response": "output"}}),
    ],
)
def test_public_data_sets_as_they_are(name: str, options: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    rows = load(shared_data(name), tokenizer, max_length=512, max_rows=200, **options)
    assert len(rows) > 190
    for row in rows:
        assert len(learned(row, tokenizer)) == 1


def test_a_book_for_continual_pretraining() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    path = shared_data("tinyshakespeare/input.txt")
    train, test = load_dataset(DataConfig(path=str(path), packing=True, max_length=256, eval_fraction=0.1), tokenizer)
    assert test is not None
    assert set(map(len, train["input_ids"][:-1])) == {256}
    assert 0.05 < len(test) / len(train) < 0.2
