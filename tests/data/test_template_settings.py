"""The settings data.chat_template and data.ignore, and what a user is told of a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset, preview
from lisa_ds.errors import ConfigError, DataError
from tests.data.rows import fresh_cache
from tests.data.template_cases import BY_MARKS, CALLS, EOS, KINDS, PLAINLY, TEMPLATES, TOOLS, says, tokenizer, user

__all__ = ["fresh_cache"]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, by: Any, **options: Any) -> Any:
    return load_dataset(DataConfig(path=path, **options), by)[0]


ROW = {"messages": [user("a"), says("b")]}


def test_a_template_of_a_file_is_used_and_kept(tmp_path: Path) -> None:
    by = tokenizer(PLAINLY)
    rows = write(tmp_path / "rows.jsonl", ROW)
    (plain,) = load(rows, by)
    file = tmp_path / "mine.jinja"
    file.write_text(BY_MARKS.replace("<|model|>", "<|assistant|>"))
    (row,) = load(rows, by, chat_template=str(file))
    assert row["input_ids"] != plain["input_ids"]  # nor does it take the rows that the other template made
    assert preview(row, by) == f"<|user|>a{EOS}<|assistant|>⟦b{EOS}⟧"
    by.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    asked = again.apply_chat_template([user("a")], tokenize=False, add_generation_prompt=True)
    assert asked == f"<|user|>a{EOS}<|assistant|>"
    assert again.chat_template == file.read_text()


def test_a_template_of_the_tokenizer_s_own_by_name(tmp_path: Path) -> None:
    by = tokenizer({"default": PLAINLY, "short": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"})
    (row,) = load(write(tmp_path / "rows.jsonl", ROW), by, chat_template="short")
    assert preview(row, by) == f"a{EOS}⟦b{EOS}⟧"


def test_several_templates_of_which_none_is_for_all(tmp_path: Path) -> None:
    by = tokenizer({"long": PLAINLY, "short": PLAINLY})
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: .*multiple chat templates with no default.*set data.chat_template"
    ):
        load(write(tmp_path / "rows.jsonl", ROW), by)
    load(write(tmp_path / "rows.jsonl", ROW), by, chat_template="short")


def test_a_template_of_trl_by_name(tmp_path: Path) -> None:
    if not TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    by = tokenizer(PLAINLY)
    (row,) = load(write(tmp_path / "rows.jsonl", ROW), by, chat_template="qwen3_training")
    assert preview(row, by).endswith("<|im_start|>assistant\n⟦<think>\n\n</think>\n\nb<|im_end|>\n⟧")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jinja", None, "no such file or directory, got '{path}'"),
        ("bad.jinja", "\n{% for m in messages %}", "not a chat template, line 2: Unexpected end of template."),
        (
            "filter.jinja",
            "{{ messages | nothing }}",
            "not a chat template, line 1: No filter named 'nothing'., got '{path}'",
        ),
        ("empty.jinja", " ", "the file is empty, got '{path}'"),
        ("bytes.jinja", b"\xff\xfe", "not text in UTF-8, got '{path}'"),
        (".", None, "is a directory, got '{path}'"),
        ("a\0b.jinja", None, "embedded null byte, got "),
        ("x" * 300 + ".jinja", None, "file name too long, got "),
    ],
)
def test_a_template_that_is_none(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "rows.jsonl", ROW), tokenizer(PLAINLY), chat_template=str(path))
    assert str(error.value).startswith(f"chat_template: {message.format(path=path)}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tall", ""), ("shor", "; did you mean 'short'?"), ("qwen3-training", "; did you mean 'qwen3_tr")],
)
def test_an_unknown_name_says_what_is_known(name: str, meant: str, tmp_path: Path) -> None:
    if not TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "rows.jsonl", ROW), tokenizer({"default": PLAINLY, "short": PLAINLY}), chat_template=name)
    expected = (
        "chat_template: should be the path of a .jinja file, a name of the tokenizer's own templates (default, short)"
    )
    assert str(error.value).startswith(f"{expected} or of TRL's (such as qwen3_training), got {name!r}{meant}")
    assert bool(meant) or str(error.value).endswith(repr(name))


def test_a_template_for_rows_that_go_through_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(PLAINLY)
    rows = write(tmp_path / "rows.jsonl", {"text": "a"})
    with pytest.raises(
        DataError, match=r"rows are text, which go through no chat template; remove data\.chat_template"
    ):
        load(rows, tokenizer(PLAINLY), chat_template=str(file))


def test_what_is_ignored_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by = tokenizer(PLAINLY)
    full = [user("a", name="Ann"), {"role": "assistant", **CALLS}, user("b"), says("c", thinking="hm")]
    rows = write(tmp_path / "rows.jsonl", {"messages": full, "tools": TOOLS, "source": "x"}, ROW)
    ignore = ["name", "tool_calls", "reasoning_content", "tools", "source", "nowhere"]
    row, plain = load(rows, by, ignore=ignore)
    assert preview(row, by) == f"<|user|>a{EOS}<|model|>{EOS}<|user|>b{EOS}<|model|>⟦c{EOS}⟧"
    assert preview(plain, by) == f"<|user|>a{EOS}<|model|>⟦b{EOS}⟧"
    assert caplog.messages == [
        f"{rows}: left out as data.ignore says: 'name' (1 times), 'tool_calls' (1 times), 'reasoning_content' (1 times), "
        "'tools' (1 times), 'source' (1 times), 'nowhere' (0 times)"
    ]


def test_what_is_noted_is_told_once_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    kinds = ("earlier reasoning", "reasoning", "several turns")
    rows = write(tmp_path / "rows.jsonl", *({"messages": KINDS[kind]} for kind in kinds))
    load(rows, tokenizer(TEMPLATES["qwen3"]))
    assert caplog.messages == [
        f"{rows}: 1 of 3 rows hold reasoning in earlier answers, which the chat template writes in the last alone: those "
        "answers are learned without it"
    ]


CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
SHARED = Path(__file__).parents[3] / "shared" / "cases"


@pytest.mark.parametrize(
    ("case", "template", "expected"),
    [
        ("3-tool-calls/toolcall_empty", "qwen2_5", [CALLED, "It is 4 C.<|im_end|>"]),
        ("3-tool-calls/toolcall_null", "qwen2_5", [CALLED, "It is 4 C.<|im_end|>"]),
        ("3-tool-calls/toolcall_text", "qwen2_5", [f"Let me look.\n{CALLED}", "It is 4 C.<|im_end|>"]),
        ("7-reasoning-content/rows", "qwen3", ["<think>\ntwo and two make four\n</think>\n\n4<|im_end|>"]),
    ],
)
def test_rows_of_bug_reports(case: str, template: str, expected: list[str]) -> None:
    path = SHARED / f"{case}.jsonl"
    if not path.exists() or template not in TEMPLATES:
        pytest.skip("needs the cases beside the checkout, and trl with its chat templates")
    by = tokenizer(PLAINLY)
    with pytest.raises(
        DataError, match=r"jsonl:1: the tokenizer's chat template does not write .* so it would be lost"
    ):
        load(str(path), by)
    row, *_ = load(str(path), by, chat_template=template)
    shown = preview(row, by)
    assert [part.partition("⟧")[0] for part in shown.split("⟦")[1:]] == expected
