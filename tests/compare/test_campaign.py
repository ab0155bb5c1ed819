"""`lisa-ds compare`: which runs it starts, and that none is lost or repeated when it is cut short. Training is stood in for."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lisa_ds import records
from lisa_ds.compare.pace import Pace
from tests.compare.campaigns import FAKE, ROWS, compare, folder, only_begun, started, write_run

__all__ = ["folder"]

SEARCH = [
    *("full-rates-s1000-lr5e-05", "lisa-rates-s1000-lr0.00033", "full-rates-s1000-lr0.00015"),
    *("lisa-rates-s1000-lr0.001", "full-rates-s1000-lr0.00045", "lisa-rates-s1000-lr0.003"),
]
VERDICT = [
    f"{arm}-verdict-s{seed}-lr{rate}" for seed in (0, 1) for arm, rate in (("full", "0.00045"), ("lisa", "0.001"))
]


def test_a_comparison_from_beginning_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare() == 0
    assert only_begun(started(folder)) == [*SEARCH, *VERDICT]
    out = folder / "out"
    said = capsys.readouterr().out
    assert "10 runs, 10 of them left; 1 at a time\n" in said
    assert "rates: full, seed 1000, learning rate 5e-05: loss 1.8974 on select, in " in said
    assert "9 of 10 runs have ended, about 0:0" in said
    assert "wrote out/comparison.md\n" in said
    for place in (path for path in (out / "runs").iterdir() if path.is_dir()):
        assert place.with_name(f"{place.name}.log").exists()
        assert not list(place.glob("checkpoint-*"))
        assert (place / "model").exists() == ("-verdict-" in place.name)
    assert not list(out.glob(".*.unfinished*"))
    read = list(records.read(out / "comparison.jsonl"))
    assert (read[0].name, read[0].value, read[0].x) == ("comparison", 10, 10)
    assert read[0].settings["chosen"] == {
        "full": {"rate": 4.5e-4, "at_edge": True},
        "lisa": {"rate": 1e-3, "at_edge": False},
    }
    assert read[0].settings["rows"] == ROWS

    assert compare("--workers", "3", "--drop-models") == 0  # nothing is repeated
    assert len(started(folder)) == 10


def test_a_run_is_given_its_seed_rate_part_and_place(folder: Path) -> None:
    compare("training.weight_decay=0.1")
    steps = {
        record.settings["run"]: record
        for record in records.read(folder / "out/comparison.jsonl")
        if record.name == "steps"
    }
    (lisa,) = [record for name, record in steps.items() if name.startswith("lisa-verdict-s1-")]
    config = lisa.settings["config"]
    assert (config["method"], config["lisa"]["seed"], config["data"]["eval_part"]) == ("lisa", 1, "verdict")
    assert config["training"] == {
        **{"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
        **{"learning_rate": 1e-3, "seed": 1, "output_dir": f"out/runs/{lisa.settings['run']}"},
        **{"eval_strategy": "steps", "eval_steps": 0.2},
    }
    assert config["statistics"] == 20
    (full,) = [record for name, record in steps.items() if name.startswith("full-rates-s1000-lr0.00015-")]
    config = full.settings["config"]
    assert (config["method"], config["data"]["eval_part"], "eval_strategy" in config["training"]) == (
        "full",
        "select",
        False,
    )


def test_several_at_once_start_no_verdict_too_early(folder: Path) -> None:
    assert compare("--workers", "3") == 0
    names = only_begun(started(folder))
    assert set(names) == {*SEARCH, *VERDICT}
    for arm in ("full", "lisa"):
        of_arm = [name for name in names if name.startswith(arm)]
        assert ["rates" in name for name in of_arm] == [True] * 3 + [False] * 2


def test_an_arm_that_fails_is_told_and_the_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "lisa-rates")
    assert compare() == 1
    said = capsys.readouterr().out
    assert "FAILED: rates: lisa, seed 1000, learning rate 0.001: exit code 2\nerror: this one fails\n" in said
    assert "7 runs have ended" not in said
    assert "5 runs have ended; 3 have failed, and are tried again by the same command\n" in said
    assert only_begun(started(folder))[6:] == [name for name in VERDICT if name.startswith("full")]
    report = (folder / "out/comparison.md").read_text()
    assert (
        "* lisa, rates, seed 1000, learning rate 0.001: exit code 2; see out/runs/lisa-rates-s1000-lr0.001-" in report
    )
    assert "| lisa | 0 | - |" in report

    monkeypatch.delenv("FAIL")
    assert compare() == 0  # what failed is tried again, what ended is not repeated
    assert len(started(folder)) == 8 + 5
    assert "Failed" not in (folder / "out/comparison.md").read_text()


def test_rows_in_another_order_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER", "lisa-verdict-s1")
    assert compare() == 2
    said = capsys.readouterr().err
    assert "out/runs/lisa-verdict-s1-lr0.001-" in said
    assert ": cannot be compared with out/runs/full-verdict-s1-lr0.00045-" in said
    assert (
        ": it has its training rows. Both have seed 1, and all arms see the same rows in the same order; if the data has changed"
        in said
    )
    assert compare() == 2  # also of what is there already


def program(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The command in a process of its own, to be signalled."""
    code = (
        "import sys; from lisa_ds.compare import process, rehearsal; from lisa_ds import cli; "
        f"process.TRAIN = {FAKE!r}; rehearsal.rehearse = lambda request, force: {ROWS!r}; sys.exit(cli.main())"
    )
    given = [
        "compare",
        "run.yaml",
        "--methods",
        "full,lisa",
        "--seeds",
        "0,1",
        "--out",
        "out",
        "--num-gpus",
        "2",
        *words,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", code, *given], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_has_runs_save_and_the_same_command_goes_on(
    folder: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW", "lisa-verdict-s0")
    running = program(folder)
    waiting = folder / "out/runs/waiting"
    deadline = time.monotonic() + 60
    while not waiting.exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    locked = compare()  # beside it
    assert locked == 2
    running.send_signal(number)
    said, err = running.communicate(timeout=60)
    assert running.returncode == code, said + err
    assert f"{signal.Signals(number).name}: runs save after their step and stop; once more ends them at once\n" in said
    assert "stopped: verdict: lisa, seed 0, learning rate 0.001; it has saved\n" in said
    assert "7 runs have ended; 3 are left for the same command\n" in said
    assert "Not all runs have ended yet." in (folder / "out/comparison.md").read_text()
    assert compare() == 0
    names = started(folder)
    assert only_begun(names) == [*SEARCH, *VERDICT]
    assert [name for name in names if name.endswith(" resumed")] == ["lisa-verdict-s0-lr0.001 resumed"]


def test_the_rest_of_a_resumed_run_says_nothing_of_the_next_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[str] = []
    monkeypatch.setattr(Pace, "took", lambda self, kind, seconds, amount=1.0: took.append(kind))
    monkeypatch.setenv("SLOW", "lisa-verdict-s0")
    assert compare("--rates", "1", "--deadline-s", "3", seeds="0") == 0
    assert took == ["full"]
    assert compare("--rates", "1", seeds="0") == 0
    assert started(folder)[-1] == "lisa-verdict-s0-lr0.001 resumed"
    assert took == ["full"]


def test_models_are_dropped(folder: Path) -> None:
    assert compare("--rates", "1", "--drop-models") == 0
    assert len([path for path in (folder / "out/runs").iterdir() if path.is_dir()]) == 4
    assert not list((folder / "out/runs").glob("*/model"))


def test_a_deadline(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "lisa-rates-s1000-lr0.00033")
    assert compare("--deadline-s", "3") == 0
    said = capsys.readouterr().out
    assert "time is up: runs save after their step and stop\n" in said
    assert "stopped: rates: lisa, seed 1000, learning rate 0.00033; it has saved\n" in said
    assert started(folder)[-1] == "lisa-rates-s1000-lr0.00033 begun"  # nothing is started any more
    assert compare() == 0
    assert only_begun(started(folder)) == [*SEARCH, *VERDICT]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_after_the_deadline_lets_runs_save_and_only_a_second_ends_them(
    folder: Path, signals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW", "full-verdict-s0")
    monkeypatch.setenv("SAVING", "1" if signals == 1 else "60")
    running = program(folder, "--rates", "1", "--deadline-s", "3")
    saving, deadline = folder / "out/runs/saving", time.monotonic() + 60
    for number in range(signals):
        while not saving.exists():
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5 * number)
        running.send_signal(signal.SIGINT)
    said, err = running.communicate(timeout=50)
    assert running.returncode == 130, said + err
    assert "time is up: runs save after their step and stop\n" in said
    assert "SIGINT: runs have been asked to save and stop; once more ends them at once\n" in said
    assert said.count("SIGINT: runs end at once\n") == signals - 1
    kept = "has saved" if signals == 1 else "had nothing to save"
    assert f"stopped: verdict: full, seed 0, learning rate 0.00015; it {kept}\n" in said


def test_what_has_no_checkpoint_is_begun_anew(folder: Path) -> None:
    assert compare() == 0
    (place,) = (folder / "out/runs").glob("full-verdict-s0-*/")
    (place / "records.jsonl").unlink()
    (place / "left over").touch()
    assert compare() == 0
    assert started(folder)[10:] == ["full-verdict-s0-lr0.00045 begun"]
    assert not (place / "left over").exists()


def test_the_runs_file_may_be_edited_meanwhile(folder: Path) -> None:
    assert compare("--rates", "1") == 0
    text = (folder / "run.yaml").read_text()
    assert (folder / "out/run.yaml").read_text() == text
    config = (folder / "out/comparison.jsonl").read_text()
    (folder / "run.yaml").write_text(text.replace("max_steps: 6", "max_steps: 7"))
    assert compare("--rates", "1") == 2
    assert (folder / "out/run.yaml").read_text() == text
    assert (folder / "out/comparison.jsonl").read_text() == config
    (folder / "run.yaml").write_text(text)
    assert compare("--rates", "1") == 0
    assert len(started(folder)) == 4


@pytest.mark.parametrize("at", ["file", "command line", "arm"])
def test_a_file_of_deepspeeds_may_be_edited_meanwhile(
    folder: Path, at: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"zero_optimization": {"stage": 3}}
    (folder / "ds.json").write_text(json.dumps(keys))
    write_run(folder, **({"deepspeed": "ds.json"} if at == "file" else {}))
    (folder / "arms.yaml").write_text("lisa: {method: lisa" + (", deepspeed: ds.json}" if at == "arm" else "}"))
    words = ["--rates", "1", "--arms", "arms.yaml", *(["deepspeed=ds.json"] if at == "command line" else [])]
    assert compare(*words, methods="full", seeds="0") == 0
    for line in records.read(folder / "out/comparison.jsonl"):
        if line.name == "steps" and (line.variant == "lisa" or at != "arm"):
            assert line.settings["config"]["deepspeed"] == keys
    assert "ds.json" not in (folder / "out/run.yaml").read_text()
    assert compare(*words, methods="full", seeds="0,1") == 0
    assert len(started(folder)) == 4
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    capsys.readouterr()
    assert compare(*words, methods="full", seeds="0,1") == 2
    assert "deepspeed.zero_optimization.stage 3, not 2" in capsys.readouterr().err


def test_arms_and_seeds_may_be_added_and_nothing_else_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "arms.yaml").write_text("K 5: {method: lisa, lisa.interval_steps: 5}\n")
    assert compare("--rates", "1") == 0
    assert compare("--rates", "1", "--arms", "arms.yaml", seeds="0,1,2") == 0
    assert len(started(folder)) == 9
    capsys.readouterr()
    for words, seeds, told in [
        (["--rates", "1", "--arms", "arms.yaml"], "0,1", "seed 2; name it too, or choose another --out"),
        (["--rates", "1"], "0,1,2", "the arm 'K 5'; name it too, or choose another --out"),
        (["--arms", "arms.yaml"], "0,1,2", "rates [0.00015], not [5e-05, 0.00015, 0.00045] of arm 'full'; choose another --out"),
        (["--rates", "1", "--arms", "arms.yaml", "training.max_steps=7"], "0,1,2", "training.max_steps 6, not 7; choose another --out"),
        (["--rates", "1", "--arms", "arms.yaml", "--num-gpus", "1"], "0,1,2", "ranks 2, not 1; choose another --out"),
    ]:  # fmt: skip
        assert compare(*words, seeds=seeds) == 2
        assert capsys.readouterr().err == f"lisa-ds: error: out/comparison.jsonl: holds a comparison with {told}\n"
    assert len(started(folder)) == 9


def test_a_comparison_goes_on_when_there_are_keys_that_were_not_yet(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--rates", "1") == 0
    file = folder / "out/comparison.jsonl"
    earlier = file.read_text().replace('"block_rest": "always", ', "").replace('"unit": "block", ', "")
    assert earlier != file.read_text()
    file.write_text(earlier)
    runs = len(started(folder))
    assert compare("--rates", "1") == 0
    assert len(started(folder)) == runs
    file.write_text(earlier)
    capsys.readouterr()
    assert compare("--rates", "1", "lisa.unit=matrix") == 2  # not the default, so not what the earlier runs had
    assert "holds a comparison with lisa.unit None, not 'matrix'" in capsys.readouterr().err


def test_a_directory_that_is_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    lock = os.open(folder / "out/.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert compare() == 2
    os.close(lock)
    assert capsys.readouterr().err == (
        "lisa-ds: error: --out: out: another comparison is at work there, or a run of an earlier one\n"
    )


def test_the_report_alone_needs_the_records_alone(folder: Path) -> None:
    from lisa_ds import cli

    assert compare() == 0
    out = folder / "out"
    first = (out / "comparison.md").read_text()
    elsewhere = folder / "results"
    elsewhere.mkdir()
    (out / "comparison.jsonl").rename(elsewhere / "comparison.jsonl")
    assert cli.main(["compare", "--out", "results", "--report-only"]) == 0
    assert (elsewhere / "comparison.md").read_text() == first


def test_nothing_heavy_is_loaded_to_plan_or_to_report(folder: Path) -> None:
    code = (
        "import sys; from lisa_ds import cli; code = cli.main(); "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'datasets') if name in sys.modules]); sys.exit(code)"
    )
    planning = ["run.yaml", "--methods", "full,lisa", "--dry-run"]
    assert compare("--rates", "1") == 0
    for words in (planning, ["--report-only"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "compare", *words, "--out", "out"], cwd=folder, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
