"""The GPU proof where there is no GPU: its stages run at toy size, its tables say what was held, and the documentation repeats them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_arms
import gpu_claims
import gpu_proof
import pytest

from lisa_ds import records

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "docs" / "results").glob("gpu_*.jsonl"))


@pytest.mark.multirank
@pytest.mark.more
def test_every_stage_runs_dry(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_proof.py"),
        "--dry-run",
        "--budget-s",
        "900",
        "--out",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    assert "stages with failures: none" in run.stdout
    found = [record for file in tmp_path.glob("*.jsonl") for record in records.read(file)]
    assert {record.settings["stage"] for record in found} == set("abcde")
    judged = [record for record in found if record.name == "claim"]
    assert {record.settings["verdict"] for record in judged} == {"dry run"}  # a number from a CPU holds nothing
    assert {record.device for record in found} == {"CPU, dry run"}


def test_a_claim_is_held_missed_or_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_claims, "device_name", lambda: "a card")
    fast, exact, seen = (
        gpu_claims.at_least("c", "is fast", 0.9),
        gpu_claims.at_most("a", "is exact", 1e-5),
        gpu_claims.at_most("b", "is seen", 0),
    )
    report = gpu_claims.Report(tmp_path / "records.jsonl", "c", dry_run=False)
    report.judge(fast, 0.95)
    report.judge(exact, 2e-5)
    assert gpu_claims.table([exact, seen, fast], list(records.read(report.path)))[2:] == [
        "| a | is exact | <= 1e-05 | 2e-05 | missed |",
        "| b | is seen | <= 0 |  | not run |",
        "| c | is fast | >= 0.9 | 0.95 | held |",
    ]


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    report = gpu_claims.Report(tmp_path / "records.jsonl", "b", dry_run=True)
    with report.part("first"):
        raise RuntimeError("out of memory")
    with report.part("second"):
        report.write("seconds", "second", 1.0, "s")
    failed, second = records.read(report.path)
    assert (failed.name, failed.variant, failed.settings["error"]) == ("failed", "first", "RuntimeError: out of memory")
    assert second.variant == "second"


def test_a_stage_that_hangs_is_ended_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "sleeps.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu_proof, "ROOT", tmp_path)
    stage = gpu_proof.Stage("b", "sleeps", 1, [])
    assert not gpu_proof.run_stage(stage, tmp_path / "out.jsonl", 1, True, {})
    assert "b: was ended at its limit" in capfd.readouterr().out


ARMS = """
model: a
data: {rows: {path: rows.jsonl, max_length: 64, eval_fraction: 0.1}, others: {path: others.jsonl, max_length: 64}}
seeds: [3, 4]
arms:
  - {arm: before, method: none}
  - {arm: full, method: full, lr: 1.0e-4, data: rows}
  - {arm: LISA, method: lisa, lr: 1, steps: 9, lisa: {num_sampled_layers: 2}}
"""


def test_arms_are_paired_by_seed(tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text(ARMS)
    found = gpu_arms.runs(gpu_arms.read(tmp_path / "arms.yaml"))
    assert [(run.arm, run.settings["data"], run.settings["seed"], run.settings["steps"]) for run in found] == [
        *[("before", "rows", 3, 0), ("before", "others", 3, 0), ("full", "rows", 3, 60)],
        *[("LISA", "rows", 3, 9), ("LISA", "others", 3, 9), ("full", "rows", 4, 60)],
        *[("LISA", "rows", 4, 9), ("LISA", "others", 4, 9)],
    ]
    assert len({run.key for run in found}) == len(found)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", "arms.yaml: seed: unknown key; there are model, data, "),
        ("seeds: [3, 4]", "seeds: 3", "arms.yaml: seeds: is of a wrong type: 3"),
        ("seeds: [3, 4]", "steps: true", "arms.yaml: steps: is of a wrong type: True"),
        ("model: a", "", "arms.yaml: model: is missing"),
        ("lr: 1,", "rate: 1,", "arms.yaml: arms[2]: rate: unknown key; there are arm, data, method, lr, "),
        ("lr: 1,", "", "arms.yaml: arms[2]: lr: is missing"),
        ("method: lisa", "method: lora", "arms.yaml: arms[2]: method: should be one of lisa, full, none, got 'lora'"),
        (", lisa: {num_sampled_layers: 2}", "", "arms.yaml: arms[2]: lisa: is for method lisa, which needs it"),
        ("data: rows}", "data: row}", "arms.yaml: arms[1]: data: should be one of rows, others, got 'row'"),
        ("- {arm: before, method: none}", "- before", "arms.yaml: arms[0]: should hold keys and values, got 'before'"),
    ],
)
def test_a_file_of_arms_that_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ARMS
    (tmp_path / "arms.yaml").write_text(ARMS.replace(old, new))
    with pytest.raises(ValueError, match=r"arms\.yaml") as refusal:
        gpu_arms.read(tmp_path / "arms.yaml")
    assert message in str(refusal.value)


def test_the_documentation_repeats_the_records() -> None:
    found = [record for path in RESULTS for record in records.read(path)]
    assert found
    assert "\n".join(gpu_proof.tables(found)).strip() in (ROOT / "docs" / "gpu.md").read_text()
