"""`lisa-ds compare` with runs that really train: a tiny model on two CPU ranks, the same rows for all arms."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lisa_ds import cli, records
from lisa_ds.compare import process, rehearsal
from lisa_ds.report.comparison import read
from tests import programs, tiny
from tests.training_runs import write_run

ARMS = "1 layer: {lisa.num_sampled_layers: 1, rates: [3.0e-3, 1.0e-2]}\nfull: {method: full, rates: [3.0e-3, 1.0e-2]}\n"
WORDS = ["run.yaml", "--arms", "arms.yaml", "--seeds", "0,1", "--out", "out", "--num-gpus", "2"]


class Forked:
    """Looks like ``Popen``, and is a run on ranks that need not import anything first."""

    def __init__(self, words: Sequence[str], environment: dict[str, str], log: Any, holds: int) -> None:
        words = [word for word in words if word not in ("--num-gpus", "2")]
        script = [str(programs.ROOT / "launch/train.py"), "--lisa_config", *words]
        self.returncode: int | None = None
        name, folder = log.name, Path.cwd()

        def run() -> None:
            done = programs.on_ranks(2, script, folder, {**environment, **programs.variables(folder)})
            Path(name).write_text(done.stdout + done.stderr)
            self.returncode = done.returncode

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        self._thread.join()

    def send_signal(self, number: int) -> None:
        raise AssertionError("nothing stops these")


def forked_apart(asked: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The rehearsal, in a process that need not import anything first."""
    script = [str(programs.ROOT / "lisa_ds/compare/rehearsal.py"), asked]
    return programs.on_ranks(0, script, Path.cwd(), {**environment, **programs.variables(Path.cwd())})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_run(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.alpaca, 48)
    (tmp_path / "arms.yaml").write_text(ARMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "launch", Forked)
    monkeypatch.setattr(rehearsal, "apart", forked_apart)
    return tmp_path


@pytest.mark.more
@pytest.mark.multirank
def test_a_comparison_that_trains(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *WORDS, "training.max_steps=4", "training.report_to=none"]) == 0, capfd.readouterr()
    found = read.load(folder / "out/comparison.jsonl")
    assert len(found.runs) == 8
    assert not any(run.diverged for run in found.runs)
    before = {run.curve[0][0] for run in found.runs if run.stage == "verdict"}
    assert len(before) == 1  # one model, one half of the held-out rows
    assert before != {run.curve[0][0] for run in found.runs if run.stage == "rates"}
    for arm in found.arms:
        tried = {run.rate: run.loss for run in found.of(arm, "rates")}
        assert {run.rate for run in found.of(arm)} == {min(tried, key=lambda rate: tried[rate] or 0)}
        assert all((run.loss or 9) < run.curve[0][0] for run in found.of(arm))
        # To the byte what the planner says.
        assert {run.state for run in found.of(arm)} == {found.planned[arm]["state"]}
    assert found.about.settings["rows"]["train"] > 20
    orders = [
        json.dumps(record.settings["order"], sort_keys=True)
        for place in (folder / "out/runs").glob("*-s0-*/")
        for record in records.read(place / "records.jsonl")
    ]
    assert len(set(orders)) == 1
    assert '"seed": 0' in orders[0]
    text = (folder / "out/comparison.md").read_text()
    assert "8 of 8 runs, each on 2 ranks, 4 steps, 1 at a time." in text


@pytest.mark.more
@pytest.mark.multirank
def test_lora_and_galore_hold_what_is_planned(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("galore_torch")
    (folder / "arms.yaml").write_text(
        "lora: {method: lora, lora.rank: 4}\n"
        "galore: {method: galore, galore.rank: 4}\n"
        "galore fp32: {method: galore, galore.rank: 4, galore.master_weights: true}\n"
        "full: {method: full}\n"
    )
    words = [*WORDS, "--rates", "1", "training.max_steps=4", "training.report_to=none", "--drop-models"]
    words[words.index("0,1")] = "0"
    assert cli.main(["compare", *words]) == 0, capfd.readouterr()
    found = read.load(folder / "out/comparison.jsonl")
    assert found.arms == ["lora", "galore", "galore fp32", "full"]
    for arm in found.arms:
        (run,), planned = found.of(arm), found.planned[arm]
        assert (run.state, run.with_weights) == (planned["state"], planned["state"] + planned["weights"]), arm
    (plain,), (fp32,) = found.of("galore"), found.of("galore fp32")
    assert fp32.values["live_bytes/weights"] == 2 * plain.values["live_bytes/weights"]
    assert not list((folder / "out/runs").glob("*/model"))


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("arms", "words", "told"),
    [
        ("A: {method: full}\nB: {lisa.num_sampled_layers: 9}", [], "arms.yaml: B: lisa.num_sampled_layers: "),
        (ARMS, ["data.eval_fraction=1e-6"], "rows.jsonl: data.eval_fraction holds out none of its 48 rows"),
        (ARMS, ["data.eval_fraction=0", "data.eval_path=one.jsonl"], "one.jsonl: data.eval_part 'select' is left without a row, of 1 held out; "),
    ],
)  # fmt: skip
def test_what_no_run_could_do_is_refused_before_the_first(
    arms: str, words: list[str], told: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "arms.yaml").write_text(arms)
    tiny.write_rows(folder / "one.jsonl", tiny.alpaca, 1)
    assert cli.main(["compare", *WORDS, *words]) == 2
    assert f"lisa-ds: error: {told}" in capfd.readouterr().err
    assert not (folder / "out/runs").exists()


@pytest.mark.nightly
@pytest.mark.more
@pytest.mark.multirank
def test_the_launcher_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """By the stock launcher, as a user starts it: stopped in a run of the verdict, which goes on from where it saved."""
    write_run(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.alpaca, 48)
    (tmp_path / "arms.yaml").write_text(ARMS.replace("[3.0e-3, 1.0e-2]", "[1.0e-2]"))
    command = [sys.executable, "-m", "lisa_ds.cli", "compare", *WORDS, "--workers", "2", "training.report_to=none"]
    command += ["training.max_steps=60", "training.save_steps=100"]
    environment = {**os.environ, **programs.variables(tmp_path)}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not any("  loss " in log.read_text() for log in (tmp_path / "out/runs").glob("*.log")):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    said, _ = started.communicate(timeout=240)
    assert started.returncode == 130, said
    assert "it has saved\n" in said
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 runs have ended" in again.stdout
    logs = [log.read_text() for log in (tmp_path / "out/runs").glob("*.log")]
    assert any("going on from out/runs/" in log for log in logs)
    found = read.load(tmp_path / "out/comparison.jsonl")
    assert {run.steps for run in found.runs} == {60}
