"""Loss is on the answers and nowhere else, token by token; long rows are cut, and plain text is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lisa_ds.data import preview
from lisa_ds.data.files import read_rows
from lisa_ds.data.tokenise import IGNORED, Tokeniser
from lisa_ds.errors import DataError
from tests.data.chatml import CHATML, as_stored, base_tokenizer, bpe, learned, load, tokenizer, turns, uncased, write
from tests.data.rows import fresh_cache
from tests.train.builtin import smollm2

__all__ = ["base_tokenizer", "bpe", "fresh_cache", "tokenizer", "uncased"]

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
