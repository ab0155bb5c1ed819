"""Log entries of a run on the console: one line each, whatever they hold."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_ds.integrations.console import Console, draw, line, show_lines
from lisa_ds.integrations.trainer import LabelLogitsTrainer
from tests import tiny

TRAINING = {"loss": 3.28204, "grad_norm": 2.9241, "learning_rate": 4.7658e-4, "epoch": 0.20818}
SPEED = {"tokens_per_second": 82.04, "tokens_per_second_per_gpu": 41.02, "mfu": 0.3142, "hfu": 0.42}
MEMORY = {"max_rank_memory_gb": 2.3401, "max_rank_reserved_gb": 2.5}
LISA = {"lisa/interval": 1, "lisa/state_mb": 247.701}
LARGE = {
    **{"loss": 1234.56789, "grad_norm": 123456.7, "learning_rate": 1.23456e-12, "epoch": 123.456},
    **{"tokens_per_second": 12345678.9, "tokens_per_second_per_gpu": 1.0, "max_rank_memory_gb": 179.123},
}


@pytest.mark.parametrize(
    ("entry", "step", "shown"),
    [
        (TRAINING, (10, 400), "step  10/400  epoch 0.21  loss 3.2820  grad 2.92  lr 4.77e-04"),
        (
            {**TRAINING, **LISA, **SPEED, **MEMORY},
            (10, 40),
            "step 10/40  epoch 0.21  loss 3.2820  grad 2.92  lr 4.77e-04  82 tok/s  2.34 GB  interval 1  MFU 31%",
        ),
        (
            {**TRAINING, "skipped_steps": 3, **SPEED, **MEMORY, **LISA},
            (10, 40),
            "step 10/40  epoch 0.21  loss 3.2820  grad 2.92  lr 4.77e-04  skipped steps 3  82 tok/s  2.34 GB",
        ),
        (
            {**TRAINING, **SPEED, **MEMORY, **LISA, "waiting_for_data": 0.451},
            (10, 40),
            "step 10/40  epoch 0.21  loss 3.2820  grad 2.92  lr 4.77e-04  82 tok/s  waiting 45%  2.34 GB",
        ),
        (
            {**TRAINING, **SPEED, **MEMORY, "waiting_for_data": 0.049},
            (10, 40),
            "step 10/40  epoch 0.21  loss 3.2820  grad 2.92  lr 4.77e-04  82 tok/s  2.34 GB  MFU 31%",
        ),
        (
            {**LARGE, **LISA, "skipped_steps": 12},
            (100000, 100000),
            "step 100000/100000  epoch 123.46  loss 1234.5679  grad 1.23e+05  lr 1.23e-12  skipped steps 12",
        ),
        (
            {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.0, "epoch": 1},
            (1, 6),
            "step 1/6  epoch 1.00  loss nan  grad inf  lr 0.00e+00",
        ),
        (
            {"eval_loss": 2.12, "eval_runtime": 9.2871, "eval_samples_per_second": 6891.3, "eval_steps_per_second": 0.43, "epoch": 1.0},
            (20, 40),
            "step 20/40  epoch 1.00  held-out loss 2.1200  9.3 s  6.89k rows/s",
        ),
        (
            {"eval_loss": 2.12, "eval_accuracy": 0.91234567, "eval_rows_not_finite": 2, "eval_runtime": 9.0, "epoch": 1.0},
            (20, 40),
            "step 20/40  epoch 1.00  held-out loss 2.1200  eval accuracy 0.9123  eval rows not finite 2  9.0 s",
        ),
        (
            {"train_runtime": 147.31, "train_samples_per_second": 1.1, "train_steps_per_second": 0.27, "train_loss": 2.9, "total_flos": 1e12},
            (40, 40),
            "step 40/40  trained for 147.3 s",
        ),
        ({"a_metric_of_somebody": "x" * 200, "loss": 1.0}, (1, 2), "step 1/2  loss 1.0000"),
    ],
)  # fmt: skip
def test_an_entry_is_one_line(
    entry: dict[str, Any], step: tuple[int, int], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert line(entry, *step) == shown
    assert len(shown) <= 100
    monkeypatch.setenv("COLUMNS", "60")  # a narrower terminal; a wider one changes nothing
    assert len(line(entry, *step)) <= 60
    monkeypatch.setenv("COLUMNS", "250")
    assert line(entry, *step) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (999.4, "999"), (999.6, "1.00k"), (12345, "12.3k"), (123456, "123k"), (1.5e6, "1.50M")],
)
def test_rates_take_few_columns(value: float, shown: str) -> None:
    assert line({"tokens_per_second": value}, 1, 2) == f"step 1/2  {shown} tok/s"


@pytest.mark.parametrize(
    "what",
    [
        f"layers {list(range(80))}",
        f"layers {list(range(10, 42, 2))}",
        "layers [10, 20, 30, 40] and embeddings, lm_head, rest",
        "layers [1] and nothing else",
    ],
)
@pytest.mark.parametrize(("step", "interval"), [(1, 0), (123456, 24691)])
def test_a_draw_is_one_line(what: str, step: int, interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = draw(step, interval, what, 123_456_789_012)
    assert text.startswith(f"step {step}: interval {interval} trains layers [1" if what[8] == "1" else f"step {step}: ")
    assert text.endswith("; live state 123456.8 MB on a rank")
    assert len(text) <= 100
    assert what in text or " ...; live state" in text


class _Keep(TrainerCallback):
    """What callbacks behind the console see."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_file_has_lines_and_no_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str], disable_tqdm: bool) -> None:
    tiny.write_model(tmp_path / "model")
    args = TrainingArguments(
        str(tmp_path / "out"),
        **{"use_cpu": True, "report_to": "none", "max_steps": 2, "logging_steps": 1, "save_strategy": "no"},
        **{"eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": disable_tqdm, "eval_on_start": True},
    )
    trainer = _trainer(tmp_path, args)
    show_lines(trainer)
    keep = _Keep()
    trainer.add_callback(keep)
    trainer.train()
    trainer.evaluate()  # transformers shows nothing of one after training
    output, errors = capfd.readouterr()
    assert "\r" not in output + errors
    lines = output.splitlines()
    assert [text.split("  ")[0] for text in lines] == [
        *("measuring the held-out loss before training ...", "step 0/2", "training, from step 1 to 2 ..."),
        *("step 1/2", "step 2/2", "step 2/2", "step 2/2", "step 2/2"),
    ]
    assert sum("held-out loss" in text for text in lines[1:]) == 3
    assert not any("{" in text for text in lines)
    history = trainer.state.log_history
    assert len(keep.seen) == 6
    assert all(set(seen) <= set(kept) for seen, kept in zip(keep.seen, history, strict=True))
    assert "eval_steps_per_second" in keep.seen[0]  # which no line has


def test_a_terminal_has_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.write_model(tmp_path / "model")
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=2, logging_steps=1)
    trainer = _trainer(tmp_path, args)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show_lines(trainer)
    trainer.train()
    output, errors = capfd.readouterr()
    assert "2/2" in errors.rsplit("\r", 1)[-1]
    assert len([text for text in output.splitlines() if text.startswith("step ")]) == 3


def test_the_console_stands_in_for_what_transformers_has(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    trainer = _trainer(tmp_path, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"))
    show_lines(trainer)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("Console") == 1
    assert not {"ProgressCallback", "PrinterCallback"} & set(names)
    assert isinstance(trainer.callback_handler.callbacks[-1], Console)  # it shows what the others have added


def _trainer(folder: Path, args: TrainingArguments) -> LabelLogitsTrainer:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8)
    return LabelLogitsTrainer(model, args, train_dataset=rows, eval_dataset=rows)
