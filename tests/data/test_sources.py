"""Rows come from files of every kind, from directories, the hub and the built-in corpus."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset, stdlib_docs
from lisa_ds.errors import DataError
from tests.data.chatml import PAIRS, bpe, learned, load, tokenizer, write
from tests.data.rows import fresh_cache
from tests.train.builtin import shared_data, smollm2

__all__ = ["bpe", "fresh_cache", "tokenizer"]

# --- files ----------------------------------------------------------------------------------------------------------


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
