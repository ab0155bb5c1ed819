"""`layers.jsonl`: what trainers of every method write, what survives a crash, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.cli import main
from lisa_ds.errors import DataError
from lisa_ds.sampling import statistics
from lisa_ds.sampling.statistics import History, Recording, Start, Writer
from tests.isolated import run_isolated
from tests.ranks import run_ranks
from tests.report.layer_statistics_runs import under_zero3, without_deepspeed

START = Start(step=0, method="lisa", model="m", units=("embeddings", "0", "1", "rest"), tied=True, settings={"seed": 1})


def recording(step: int, **changes: Any) -> Recording:
    norms = {"embeddings": 1.0 * step, "0": 2.0, "1": None, "rest": 1.0}
    fields: dict[str, Any] = {"weight_norm": norms, "gradient_norm": norms, "update_norm": norms}
    fields |= {"step": step, "interval": (step - 1) // 2, "sampled": ("embeddings", "0"), "gradient_steps": 2}
    return Recording(**{**fields, "visits": (step // 2, 0), "probabilities": (0.5, 0.5), **changes})


def write(path: Path, *lines: Start | Recording) -> Path:
    writer: Writer | None = None
    for line in lines:
        if isinstance(line, Start):
            writer = Writer(path, line)
        else:
            assert writer is not None
            writer.append(line)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path / "out" / "layers.jsonl", START, recording(2), recording(4))
    history = statistics.read(tmp_path / "out")
    assert history == History(path, START, (recording(2), recording(4)))
    assert history.mean_weight_norm() == {"embeddings": 3.0, "0": 2.0, "rest": 1.0}
    assert history.visits() == {"0": 2, "1": 0}


def test_a_resumed_run_does_not_count_twice(tmp_path: Path) -> None:
    """Killed at 7 with a checkpoint of 5: what was recorded at 6 is of a past that the resumed run has not had."""
    path = write(tmp_path / "layers.jsonl", START, recording(2), recording(4), recording(6, visits=(9, 9)))
    again = dataclasses.replace(START, step=5)
    write(path, again)
    assert [line.step for line in statistics.read(path).recordings] == [2, 4]  # also if it is killed again at once
    write(path, again, recording(6), recording(8))
    history = statistics.read(path)
    assert [line.step for line in history.recordings] == [2, 4, 6, 8]
    assert history.visits() == {"0": 4, "1": 0}
    assert history.mean_weight_norm()["embeddings"] == 5.0
    write(path, START, recording(2))  # another run in the same place
    assert [line.step for line in statistics.read(path).recordings] == [2]


def test_a_last_line_cut_short_is_passed_over_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "layers.jsonl", START, recording(2), recording(4))
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert [line.step for line in statistics.read(path).recordings] == [2]
    assert f"{path}:3: passing over a last line that was not finished" in caplog.text
    write(path, dataclasses.replace(START, step=2), recording(4))
    assert [line.step for line in statistics.read(path).recordings] == [2, 4]


def spoilt(**changes: Any) -> str:
    return json.dumps({"kind": "recording", **dataclasses.asdict(recording(4)), **changes})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "recording", "ste', "no line of layer statistics: Unterminated string"),
        ("[]", "no line of layer statistics: not an object"),
        ('{"kind": "record"}', "no line of layer statistics: kind should be 'start' or 'recording'"),
        ('{"kind": "start"}', "no line of layer statistics: .*missing"),
        (spoilt(colour=1), "no line of layer statistics: unknown field colour"),
        (spoilt(step=2.5), "no line of layer statistics: step should be a whole number, got 2.5"),
        (spoilt(weight_norm={"0": "much"}), "no line of layer statistics: weight_norm of 0 should be a number"),
        (spoilt(weight_norm={"7": 1.0}), "unit '7' is not among the run's"),
        (spoilt(visits=[1]), "visits: got 1 values for 2 blocks"),
        (
            json.dumps({"kind": "start", **dataclasses.asdict(dataclasses.replace(START, step=2, units=("0",)))}),
            "two models",
        ),
    ],
)
def test_a_malformed_line_is_told_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "layers.jsonl", START, recording(2))
    path.write_text(path.read_text() + line + "\n" + spoilt() + "\n")
    with pytest.raises(DataError, match=message) as caught:
        statistics.read(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_a_missing_file_and_an_empty_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"layers\.jsonl: no layer statistics can be read: No such file"):
        statistics.read(tmp_path)
    (tmp_path / "layers.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        statistics.read(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_isolated(without_deepspeed, folder, str(folder), fresh=True)


def total(norms: dict[str, float | None]) -> float:
    return sum(norm**2 for norm in norms.values() if norm is not None) ** 0.5


@pytest.mark.parametrize("name", ["full", "lora", "unclipped"])
def test_a_plain_trainer_s_norms_are_those_of_its_model(plain: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, results = plain
    history, expected = statistics.read(folder / name), results[name]
    assert [line.step for line in history.recordings] == [1, 2, 3, 4]
    assert history.recordings[-1].weight_norm == pytest.approx(expected["weights"], rel=1e-5)
    for line, grad_norm, moved in zip(history.recordings, expected["grad_norms"], expected["moved"], strict=True):
        assert total(line.gradient_norm) == pytest.approx(
            grad_norm, rel=1e-5
        )  # before clipping, as the trainer logs it
        assert {u: n for u, n in line.update_norm.items() if n is not None} == pytest.approx(moved, rel=1e-3)
        assert set(line.sampled) == set(moved)
        assert (line.visits, line.probabilities) == (None, None)
    if name != "unclipped":
        assert min(expected["grad_norms"]) > 0.2  # it did clip: the gradients that stepped were half as long
    assert history.start.method == ("lora" if name == "lora" else "full")
    assert history.start.tied == (name == "unclipped")
    assert ("lm_head" in history.start.units) != history.start.tied


def test_under_lora_a_weight_holds_its_adapters(plain: tuple[Path, dict[str, Any]]) -> None:
    """The control: neither the frozen weights alone nor all parameters together have these norms."""
    folder, results = plain
    base = statistics.read(folder / "full").recordings[0].weight_norm
    for unit in ("embeddings", "0"):
        assert results["lora"]["weights"][unit] != pytest.approx(base[unit], rel=1e-4)


def test_a_weight_that_is_no_sum_is_not_guessed(plain: tuple[Path, dict[str, Any]]) -> None:
    line = statistics.read(plain[0] / "dora").recordings[-1]
    assert line.weight_norm["0"] is None
    assert line.weight_norm["rest"] is not None
    assert line.gradient_norm["0"] is not None


def test_gradients_are_averaged_over_the_steps_between(plain: tuple[Path, dict[str, Any]]) -> None:
    folder, results = plain
    first, last = statistics.read(folder / "default").recordings
    assert (first.step, first.gradient_steps, last.step, last.gradient_steps) == (20, 20, 22, 2)
    squares = [norm**2 for norm in results["default"]]
    assert total(first.gradient_norm) == pytest.approx((sum(squares[:20]) / 20) ** 0.5, rel=1e-4)
    assert total(last.gradient_norm) == pytest.approx((sum(squares[20:]) / 2) ** 0.5, rel=1e-4)


def test_what_cannot_be_read_is_refused_by_name(plain: tuple[Path, dict[str, Any]]) -> None:
    assert plain[1]["refused"].startswith(
        "LayerStatistics: reads ZeRO-3's partitions, but the trainer's DeepSpeed config"
    )


def test_the_report_is_of_what_was_recorded(
    plain: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full, LoRA and DoRA (whose weights are not known) beside each other, and a model whose head is tied."""
    pytest.importorskip("matplotlib")
    runs = [plain[0] / name for name in ("full", "lora", "dora", "unclipped")]
    assert main(["report", "layers", *map(str, runs), "--out", str(tmp_path)]) == 0
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    for place, run in ((1, runs[0]), (4, runs[1])):
        norms = [line.weight_norm["2"] for line in statistics.read(run).recordings]
        assert float(table["2"][place]) == pytest.approx(sum(norms) / 4, rel=1e-3)
    assert table["2"][7] == "-"
    assert table["lm_head"][10:] == ["-", "-", "-"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["weight_norms.png"]


@pytest.mark.parametrize("every", [0, True, "often", 1.5])
def test_a_wrong_interval_is_refused(every: Any) -> None:
    from lisa_ds.integrations.statistics import LayerStatistics

    with pytest.raises(ValueError, match="every: should be 'interval' or a number of steps"):
        LayerStatistics(None, "layers.jsonl", every=every)


@pytest.mark.multirank
def test_under_zero3(tmp_path: Path) -> None:
    """One spawn: LISA, stopped and resumed, and LoRA."""
    pytest.importorskip("peft")
    found = run_ranks(2, under_zero3, tmp_path, str(tmp_path), timeout_s=240)[0]
    first, second = found["first"], found["second"]
    assert [(line.step, line.interval) for line in first.recordings] == [(3, 0), (6, 1), (8, 2)]
    assert [(line.step, line.interval) for line in second.recordings] == [(3, 0), (6, 1), (8, 2)]
    assert found["lines"] == 4 + 3  # only appended to
    for line, again in zip(first.recordings, second.recordings, strict=True):
        assert line.weight_norm == again.weight_norm
        assert line.update_norm == again.update_norm
        assert (line.visits, line.probabilities) == (again.visits, again.probabilities)
    assert (first.recordings[1].gradient_steps, second.recordings[1].gradient_steps) == (
        3,
        1,
    )  # of before the stop, none
    assert found["history"] == found["resumed_history"]
    for line, layers in zip(first.recordings, found["history"], strict=False):
        assert tuple(int(unit) for unit in line.sampled if unit.isdecimal()) == layers
    counts = statistics.count_visits(4, found["history"][:3])
    assert first.visits() == second.visits() == {str(block): count for block, count in enumerate(counts)}
    lora = statistics.read(tmp_path / "lora")
    assert lora.start.method == "lora"
    assert lora.recordings[-1].weight_norm == pytest.approx(found["lora"], rel=1e-5)
    for line, grad_norm in zip(lora.recordings, found["grad_norms"], strict=True):
        assert total(line.gradient_norm) == pytest.approx(grad_norm, rel=1e-4)
