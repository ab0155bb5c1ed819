"""`lisa-ds preview`: rows as text, with what is learned in brackets."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.cli import main
from tests import tiny


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run whose model has a tokenizer alone: weights would not load."""
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rows = [{"messages": tiny.pair(i)["prompt"] + tiny.pair(i)["completion"], "source": "here"} for i in range(4)]
    rows.append({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]})
    write(tmp_path / "rows.jsonl", rows)
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name_or_path: {tmp_path / 'model'}}}\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\n")
    return path


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_shown_with_what_is_learned_and_what_was_left_out(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    held_out = write(tmp_path / "other.jsonl", [{"messages": tiny.pair(7)["prompt"] + tiny.pair(7)["completion"]}])
    assert main(["preview", "--lisa_config", str(run_file), f"data.eval_path={held_out}", "--rows", "2"]) == 0
    rows = tmp_path / "rows.jsonl"
    assert caplog.messages == [
        f"{rows}: of 5 rows, 1 dropped, nothing to learn within data.max_length 1024",
        f"{rows}: columns not used: 'source' (4 rows)",
    ]
    assert capsys.readouterr().out == (
        "training data: 4 rows, 72 tokens (36 with loss), longest 18\n"
        "\n--- row 1: 18 tokens, 9 with loss ---\n"
        "<|user|>0 + 0?<|end|><|assistant|>⟦It is 0.<|end|>⟧\n"
        "\n--- row 2: 18 tokens, 9 with loss ---\n"
        "<|user|>1 + 1?<|end|><|assistant|>⟦It is 2.<|end|>⟧\n\n"
        "held-out data: 1 rows, 19 tokens (10 with loss), longest 19\n"
        "\n--- row 1: 19 tokens, 10 with loss ---\n"
        "<|user|>7 + 7?<|end|><|assistant|>⟦It is 14.<|end|>⟧\n\n"
    )


def test_texts_and_classes(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": "ab"}])
    assert main(["preview", str(run_file), f"data.path={texts}"]) == 0
    assert "--- row 1: 3 tokens, 3 with loss ---\n⟦ab<|end|>⟧\n" in capsys.readouterr().out
    classes = write(tmp_path / "classes.jsonl", [{"text": "ab", "label": "good"}, {"text": "c", "label": "bad"}])
    task = "model.task=sequence_classification"
    assert main(["preview", str(run_file), f"data.path={classes}", task]) == 0
    assert "--- row 1: 2 tokens, label good ---\nab\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "preview: name the FILE of a run"),
        (["none.yaml"], "none.yaml: no such file"),
        (["{run}", "data.chat_template=none.jinja"], "data.chat_template: no such file or directory, got 'none.jinja'"),
        (["{run}", "data.path=none.jsonl"], "none.jsonl"),
        (["{run}", "--rows", "0"], "argument --rows: should be a whole number, 1 or more, got '0'"),
    ],
)
def test_mistakes_take_one_line(
    arguments: list[str], message: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", *(argument.format(run=run_file) for argument in arguments)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_terminal_shows_colour_and_is_not_steered_by_rows(run_file: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\x1b[2J\u202e"}]
    rows = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lisa_ds.cli", "preview", str(run_file), f"data.path={rows}"]
    subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, check=True, env={**os.environ, "NO_COLOR": ""})
    os.close(theirs)
    shown = os.read(ours, 9999).decode()
    os.close(ours)
    assert r"<|assistant|>" + "\x1b[32;4m⟦b" + r"\x1b[2J\u202e<|end|>⟧" + "\x1b[0m" in shown


def test_an_ascii_terminal_is_no_traceback(run_file: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lisa_ds.cli", "preview", str(run_file), "--rows", "1"]
    shown = subprocess.run(command, capture_output=True, check=True, env=environment, text=True).stdout
    assert shown.startswith(
        f"{run_file.parent / 'rows.jsonl'}: of 5 rows, 1 dropped, nothing to learn within data.max_"
    )
    assert r"\u27e6It is 0.<|end|>\u27e7" in shown
