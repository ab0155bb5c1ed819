"""`log.jsonl` holds what a trainer logs: the entries of all callbacks, over kills and resumes, and what trackers get."""

from __future__ import annotations

import json
import logging
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lisa_ds import run_log
from lisa_ds.integrations.clock import Clock
from lisa_ds.integrations.log_file import LogFile
from lisa_ds.integrations.phases import Phases
from lisa_ds.integrations.throughput import Throughput
from lisa_ds.integrations.trainer import LabelLogitsTrainer
from tests import tiny

STEPS = 6


class Killed(TrainerCallback):
    """Ends the process, as far as the trainer can tell, after a step that has been logged."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def run(
    folder: Path, *more: TrainerCallback, resume: int | None = None, report_to: str = "none", **changes: Any
) -> Any:
    """A run of :data:`STEPS` without DeepSpeed, logged at every step and saved after the third."""
    arguments = {"logging_steps": 1, "save_steps": 3, "eval_steps": 2, "eval_strategy": "steps", **changes}
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=1, report_to=report_to, use_cpu=True, disable_tqdm=True,
        eval_on_start=resume is None, **arguments,
    )  # fmt: skip
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny.config())
    rows = Dataset.from_list([{"input_ids": list(range(9)), "labels": list(range(9))}] * 16)
    trainer: Any = LabelLogitsTrainer(
        model, args, train_dataset=rows, eval_dataset=rows.select(range(2)), callbacks=[*more]
    )
    clock = Clock(trainer)
    trainer.add_callback(clock)
    trainer.callback_handler.callbacks[:0] = [Throughput(trainer, clock, None), Phases(trainer)]
    trainer.add_callback(LogFile(clock, {"method": "full"}, "1 x CPU"))
    trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
    return trainer


def history_of(trainer: Any) -> list[dict[str, Any]]:
    return [{**entry} for entry in trainer.state.log_history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_the_file_holds_every_entry_as_the_trainer_has_it(whole: tuple[Path, Any]) -> None:
    folder, trainer = whole
    log = run_log.read(folder)
    assert log.start is not None
    assert (log.start.config, log.start.steps, log.start.device) == ({"method": "full"}, STEPS, "1 x CPU")
    assert log.begun_at == (0,)
    written = [{key: value for key, value in entry.items() if key != "seconds"} for entry in log.entries]
    assert written == history_of(trainer)
    assert [point.step for point in log.series("loss")] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in log.series("eval_loss")] == [0, 2, 4, 6]
    for key in ("tokens_per_second", "max_rank_memory_gb", "forward_s", "backward_s", "optimizer_s", "grad_norm"):
        assert all(point.value > 0 for point in log.series(key)), key
        assert len(log.series(key)) == STEPS
    seconds = [entry["seconds"] for entry in log.entries]
    assert seconds == sorted(seconds)
    assert 0 < log.seconds < 100


@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_goes_on_counting_and_its_later_entries_are_dropped(
    tmp_path: Path, whole: tuple[Path, Any], every: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(5), logging_steps=every)  # the checkpoint is of step 3
    before = run_log.read(tmp_path)
    saved = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    saved = saved["stateful_callbacks"]["lisa_ds_seconds_of_training"]["attributes"]["seconds"]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "ep')  # in the middle of a line
    run(tmp_path, resume=3, logging_steps=every)
    log = run_log.read(tmp_path)
    assert log.begun_at == (0, 3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line["step"] == 4 and "loss" in line for line in lines) == 2
    (begun,) = (line for line in lines if "begins" in line and line["step"] == 4)
    assert begun["seconds"] == pytest.approx(saved, abs=0.01)
    first = run_log.read(whole[0])
    assert [point.step for point in log.series("loss")] == [*range(every, STEPS + 1, every)]
    assert [point.step for point in log.series("eval_loss")] == [0, 2, 4, 6]
    losses = {point.step: point.value for point in first.series("loss")}
    if every == 1:
        assert {point.step: point.value for point in log.series("loss")} == losses
    seconds = [entry["seconds"] for entry in log.entries]
    assert seconds == sorted(seconds)
    since = [entry["seconds"] for entry in log.entries if entry["step"] > 3]
    assert min(since) >= begun["seconds"] >= before.series("loss")[0].seconds > 0


def test_a_run_that_begins_anew_drops_all_that_was_before(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(2))
    run(tmp_path)
    log = run_log.read(tmp_path)
    assert log.begun_at == (0, 0)
    assert [entry["step"] for entry in log.entries if "eval_loss" in entry] == [0, 2, 4, 6]


def test_a_full_disk_ends_the_log_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log.Writer, "append", full)
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path)
    assert trainer.state.global_step == STEPS
    told = [record.getMessage() for record in caplog.records if "log.jsonl" in record.getMessage()]
    assert told == [
        f"{tmp_path}/log.jsonl: cannot be written, so entries are no longer logged to it: No space left on device"
    ]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show, read back from its files."""
    from tensorboard.backend.event_processing import event_accumulator

    (events,) = {path.parent for path in folder.rglob("events.*")}
    read = event_accumulator.EventAccumulator(str(events)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from the log, under the names that trackers of transformers use."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in run_log.read(folder).entries:
        for key, value in entry.items():
            if key not in ("step", "seconds"):
                name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                found.setdefault(name, []).append((entry["step"], value))
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, report_to="tensorboard")
    seen, told = scalars(tmp_path), expected(tmp_path)
    assert {"train/forward_s", "train/tokens_per_second", "train/max_rank_memory_gb", "eval/loss"} <= told.keys()
    assert seen.keys() == told.keys()
    for name, points in told.items():
        assert [step for step, _ in seen[name]] == [step for step, _ in points], name
        assert [value for _, value in seen[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def test_wandb_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    run(tmp_path / "out", report_to="wandb")
    wandb.finish()
    wandb.teardown()  # its service writes the file
    seen: dict[str, list[tuple[int, float]]] = {}
    for row in written_by_wandb(tmp_path):
        step = row.pop("train/global_step")
        for name, value in row.items():
            if name.startswith(("train/", "eval/")):
                seen.setdefault(name, []).append((step, value))
    told = expected(tmp_path / "out")
    for key in ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"):
        told.pop(f"train/{key}")  # totals, which transformers puts into the run's summary
    assert seen.keys() == told.keys()
    for name, points in told.items():
        assert [step for step, _ in seen[name]] == [step for step, _ in points], name
        assert [value for _, value in seen[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def written_by_wandb(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's file: records in the format of LevelDB's logs, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    data, at, block, whole = path.read_bytes(), 7, 32768, b""
    rows = []
    while at + 7 <= len(data):
        if block - at % block < 7:  # no header fits into the rest of the block
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or the last part of it
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            items = record.history.item
            if items:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[]", "log.jsonl:2: no log entry: not an object"),
        ("{", "log.jsonl:2: no log entry: Expecting property name"),
        ('{"step": "1", "seconds": 0}', "log.jsonl:2: no log entry: step should be a whole number, 0 or more, got '1'"),
        ('{"step": 1, "seconds": -1}', "log.jsonl:2: no log entry: seconds should be a number, 0 or more, got -1"),
        ('{"step": 1, "seconds": 0, "begins": {}}', "log.jsonl:2: no start of a run: "),
    ],
)
def test_a_malformed_line_is_told(tmp_path: Path, line: str, told: str) -> None:
    from lisa_ds.errors import DataError

    (tmp_path / "log.jsonl").write_text('{"step": 0, "epoch": 0, "seconds": 0, "eval_loss": 3.0}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        run_log.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{told}")


def test_numbers_that_json_cannot_hold_are_null_and_scalars_of_torch_are_numbers(tmp_path: Path) -> None:
    writer = run_log.Writer(tmp_path / "log.jsonl")
    writer.append(
        1, 0.5, 2.0, {"loss": math.nan, "grad_norm": torch.tensor(3.0), "step": 7, "shape": (1, 2), "odd": {1}}
    )
    (entry,) = run_log.read(tmp_path).entries
    assert entry == {
        **{"step": 1, "epoch": 0.5, "seconds": 2.0, "loss": None, "grad_norm": 3.0, "shape": [1, 2], "odd": "{1}"}
    }
    assert run_log.read(tmp_path).series("loss") == []


def test_without_a_line_that_says_where_an_attempt_began_a_smaller_step_does(tmp_path: Path) -> None:
    steps = [1, 2, 2, 3, 4, 3, 4, 5]
    lines = [{"step": step, "epoch": 0, "seconds": i, "loss": i} for i, step in enumerate(steps)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = run_log.read(tmp_path).series("loss")
    assert [(point.step, point.value) for point in points] == [(1, 0), (2, 2), (3, 5), (4, 6), (5, 7)]


def test_the_stock_trainer_is_logged_as_well(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    args = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 16
    trainer = Trainer(AutoModelForCausalLM.from_config(tiny.config()), args, train_dataset=rows)
    clock = Clock(trainer)
    trainer.callback_handler.callbacks.append(clock)
    trainer.add_callback(LogFile(clock, {}, "1 x CPU"))
    trainer.train()
    assert len(run_log.read(tmp_path).series("loss")) == 2
