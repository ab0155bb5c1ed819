"""A comparison whose runs are stood in for by :mod:`tests.compare.fake_train`, which takes no torch and no seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lisa_ds import cli
from lisa_ds.compare import campaign, process, rehearsal
from lisa_ds.report.comparison import figures

FAKE = (sys.executable, str(Path(__file__).with_name("fake_train.py")))
ROWS = {"train": 18, "select": 3, "verdict": 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """See :func:`prepare`."""
    return prepare(tmp_path, monkeypatch)


def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the file of a run, in which runs are stood in for, and every check before them passes."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "TRAIN", FAKE)
    monkeypatch.setattr(campaign, "POLL_S", 0.02)
    monkeypatch.setattr(rehearsal, "rehearse", lambda request, force: ROWS)
    monkeypatch.setattr(figures, "FIGURES", {})  # seconds each
    return tmp_path


def write_run(folder: Path, **changes: Any) -> None:
    (folder / "model").mkdir(exist_ok=True)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 260,
    }
    (folder / "model/config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 2, **sizes}))
    run = {
        "model": {"name_or_path": "model"},
        "data": {"path": "rows.jsonl", "eval_fraction": 0.25, "max_length": 64},
        "lisa": {"num_sampled_layers": 1, "interval_steps": 2},
        "training": {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def compare(*words: str, seeds: str = "0,1", methods: str = "full,lisa") -> int:
    """``lisa-ds compare`` in this process."""
    given = [*(["--methods", methods] if methods else []), "--seeds", seeds]
    return cli.main(["compare", "run.yaml", *given, "--out", "out", "--num-gpus", "2", *words])


def started(folder: Path, out: str = "out") -> list[str]:
    """Runs in the order in which they were started, without the hash in their names."""
    file = folder / out / "runs/started.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [f"{name.rpartition('-')[0]} {how}" for name, how in map(str.split, lines)]


def only_begun(names: Sequence[str]) -> list[str]:
    return [name.removesuffix(" begun") for name in names if name.endswith(" begun")]
