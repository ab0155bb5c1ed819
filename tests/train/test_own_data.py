"""docs/own-data.md does what it says: its commands, in order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/own-data.md").read_text(), re.MULTILINE | re.DOTALL)
OURS = [block for block in BLOCKS if block.startswith(("lisa-ds ", "python - "))]
OTHERS = ["vllm", "curl"]  # which need what is not installed here


def test_the_page_has_every_stage_from_rows_to_a_served_model() -> None:
    assert [block.split()[0] for block in BLOCKS if block not in OURS] == OTHERS
    commands = [block.split()[1] for block in OURS if block.startswith("lisa-ds")]
    assert commands == ["init", "preview", "plan", "train", "train", "export", "generate", "evaluate", "evaluate"]
    assert all(block.count("\n") == 1 for block in OURS if block.startswith("lisa-ds"))


@pytest.mark.nightly
def test_its_commands_run(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "tiny")
    script = [f'lisa-ds() {{ "{sys.executable}" -m lisa_ds.cli "$@"; }}', f'python() {{ "{sys.executable}" "$@"; }}']
    for block in (block for block in OURS if "--tasks" not in block):  # their data is on the hub
        script += ["echo", f"echo '== {block.split()[1]}'", block.replace("builtin:smollm2-135m", "./tiny")]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(re.findall(r"^== (\w+)\n(.*?)(?=^== |\Z)", done.stdout, re.MULTILINE | re.DOTALL))  # the second `train`
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 169
    assert "wrote mine.yaml" in said["init"]
    assert "What is" in said["preview"]
    assert "2 ranks" in said["plan"]
    assert "held-out loss" in said["train"]
    assert "wrote runs/mine/model-20" in said["export"]
    assert "held-out loss per token" in said["evaluate"]
    trained = json.loads((tmp_path / "runs/mine/model/config.json").read_text())
    assert json.loads((tmp_path / "runs/mine/model-20/config.json").read_text())["vocab_size"] == trained["vocab_size"]
    assert (tmp_path / "runs/mine/model/tokenizer.json").exists()
    assert list((tmp_path / "runs/mine").glob("checkpoint-*"))
