"""What is read of a run's directory: how far it is, its log across attempts, and whether its rows came as another's did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lisa_ds import records
from lisa_ds.compare import results
from lisa_ds.errors import DataError
from lisa_ds.run_log import Point, Start, Writer

ORDER = {
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ranks": 2, "seed": 0},
    "data": {"rows": 18, "tokens": "abc"},
}


def write_records(place: Path, *values: tuple[str, float, float | None], **settings: Any) -> Path:
    place.mkdir(exist_ok=True)
    for name, value, x in values:
        about: dict[str, Any] = {"variant": "lisa", "unit": "", "device": "CPU", "commit": "0", "versions": {}}
        told = {"config": {}, "order": ORDER, **settings}
        records.append(place / "records.jsonl", records.Record(name=name, value=value, x=x, settings=told, **about))
    return place


SUMMARY = (("applied_steps", 5, None), ("skipped_steps", 1, None), ("max_rank_memory_gb", 2.0, None))


def test_the_states_of_a_run(tmp_path: Path) -> None:
    place = tmp_path / "run"
    assert results.state(place) == "none"
    place.mkdir()
    assert results.state(place) == "none"
    (place / "log.jsonl").touch()
    assert results.state(place) == "begun"
    (place / "checkpoint-2").mkdir()
    assert results.state(place) == "begun"  # cut short while it saved
    (place / "checkpoint-2/trainer_state.json").touch()
    assert results.state(place) == "saved"
    write_records(place, *SUMMARY[:2])
    assert results.state(place) == "saved"  # cut short while it wrote its summary
    with (place / "records.jsonl").open("a") as file:
        file.write('{"name": "max_rank_mem')
    assert results.state(place) == "saved"
    (place / "records.jsonl").unlink()
    write_records(place, *SUMMARY)
    assert results.state(place) == "finished"


def test_a_result(tmp_path: Path) -> None:
    place = write_records(tmp_path, ("held_out_loss", 2.0, 0), ("held_out_loss", 1.5, 6), *SUMMARY)
    (place / "log.jsonl").write_text(
        '{"step": 6, "seconds": 12.5, "loss": 1.0}\n{"step": 6, "seconds": 12.5, "eval_loss": 1.5}\n'
    )
    found = results.read(place)
    assert (found.loss_before, found.loss, found.steps, found.skipped_steps, found.seconds) == (2.0, 1.5, 6, 1, 12.5)
    resumed = write_records(tmp_path / "resumed", ("held_out_loss", 1.25, 6), *SUMMARY)
    assert (results.read(resumed).loss_before, results.read(resumed).loss) == (None, 1.25)
    diverged = write_records(tmp_path / "diverged", ("held_out_loss", 2.0, 0), *SUMMARY)
    assert math.isinf(results.read(diverged).loss)
    assert results.read(diverged).seconds is None
    with pytest.raises(DataError, match="holds no finished run"):
        results.read(write_records(tmp_path / "cut", *SUMMARY[:1]))


def test_entries_of_a_step_are_one_and_a_run_without_a_log_has_none(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    lines = [{"step": 5, "seconds": 1.0, "loss": 2.0}, {"step": 5, "seconds": 1.0, "eval_loss": 3.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = results.read_log(file)
    assert found is not None
    assert [found.series(key) for key in ("loss", "eval_loss")] == [[Point(5, 1.0, 2.0)], [Point(5, 1.0, 3.0)]]
    assert results.read_log(tmp_path / "none") is None
    file.write_text('{"stop": 20}\n')
    with pytest.raises(DataError, match=r"log.jsonl:1: no log entry: step should be a whole number"):
        results.read_log(file)


LIVE = (("live_bytes/weights", 8.0, None), ("live_bytes/gradients", 4.0, None))


def write_resumed_log(place: Path) -> None:
    """Of a run that saved after its second step, of five, and went on from there; its first attempt had come to the third."""
    writer = Writer(place / "log.jsonl")
    start = Start(config={}, steps=5, world_size=1, device="CPU")
    writer.begin(0, 0.0, 0.0, start)
    writer.append(2, 0.2, 4.0, {"forward_s": 1.0, "max_rank_memory_gb": 3.5})
    writer.append(3, 0.3, 6.0, {"forward_s": 9.0, "max_rank_memory_gb": 3.0})
    writer.begin(2, 0.2, 4.0, start)
    writer.append(5, 0.5, 10.0, {"forward_s": 2.0, "max_rank_memory_gb": 1.5})


def test_a_resumed_run_is_told_as_a_whole(tmp_path: Path) -> None:
    place = write_records(tmp_path, ("held_out_loss", 1.5, 6), *LIVE, *SUMMARY)
    write_resumed_log(place)
    found = results.read(place)
    assert found.values["max_rank_memory_gb"][0] == 3.5  # the summary is the last attempt's: 2.0
    assert found.values["live_bytes/gradients"][0] == 4.0
    assert found.log is not None
    assert found.log.seconds_by_phase() == {"forward": (2 * 1.0 + 3 * 2.0) / 5, "other": 2.0 - 1.6}


def test_bytes_without_gradients_are_no_measurement(tmp_path: Path) -> None:
    place = write_records(tmp_path, ("held_out_loss", 1.5, 6), LIVE[0], ("live_bytes/gradients", 0.0, None), *SUMMARY)
    assert not [name for name in results.read(place).values if name.startswith("live_bytes/")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, []),
        ({"gradient_accumulation_steps": 4}, ["8 rows of a rank in a step, not 16"]),
        ({"seed": 1, "ranks": 1}, ["ranks 2, not 1", "seed 0, not 1"]),
        ({"data": {"rows": 18, "tokens": "other"}}, ["its training rows"]),
        ({"new_key": 1}, ["new_key None, not 1"]),
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "dataloader_drop_last": True},
            ["per_device_train_batch_size 4, not 8", "gradient_accumulation_steps 2, not 1", "dataloader_drop_last None, not True"],
        ),
    ],
)  # fmt: skip
def test_orders_of_rows(changes: dict[str, Any], told: list[str]) -> None:
    assert results.differences(ORDER, {**ORDER, **changes}) == told
