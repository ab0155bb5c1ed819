"""A run that passes every check until a test spoils it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lisa_ds.config import load_config
from lisa_ds.errors import LisaError
from lisa_ds.train import checks, command
from tests import tiny

RUN: dict[str, Any] = {
    "model": {"name_or_path": "model"},
    "data": {"path": "rows.jsonl", "eval_fraction": 0.25, "max_length": 64},
    "lisa": {"num_sampled_layers": 1},
    "training": {"output_dir": "out", "report_to": "none"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.alpaca)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to spoil, in the working directory, on one rank of this process; the hub is not asked."""
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "run"


def refusal(*overrides: str) -> str:
    with pytest.raises(LisaError) as caught:
        checks.check(load_config("run.yaml", overrides))
    return str(caught.value)


def refused_run(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """As `launch/train.py` says it; nothing has been written."""
    assert command.main(["--lisa_config", "run.yaml", *overrides]) == 2
    out, err = capsys.readouterr()
    assert not Path("out").exists()
    (line,) = [line for line in err.splitlines() if line.startswith("[rank 0] error: ")]
    assert "Traceback" not in out + err
    return line.removeprefix("[rank 0] error: ")
