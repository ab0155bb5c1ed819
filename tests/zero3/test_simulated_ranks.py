"""One rank of many, every tensor live: the planner is exact for ranks that no test can start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lisa_ds import records
from lisa_ds.memory import KINDS, Architecture, state_bytes
from lisa_ds.memory.catalogue import require
from tests.shortened import shortened

ROOT = Path(__file__).parents[2]
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
LLAMA_2_70B, LLAMA_3_70B = "meta-llama/Llama-2-70b-hf", "meta-llama/Llama-3.1-70B"
PHASES = ("built", "after a step", "after a switch", "after the next step")


def simulate(
    folder: Path, model: str, world_size: int, *more: str, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    script = [sys.executable, str(ROOT / "benchmarks/simulate_rank.py"), "--out", str(folder / "records.jsonl")]
    options = ["--model", model, "--world-size", str(world_size), *more]
    return subprocess.run(
        [*script, *options],
        cwd=folder,
        env=environment | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def measured(folder: Path) -> tuple[dict[str, dict[str, records.Record]], dict[str, float]]:
    """Records of each phase by kind, and what the process held."""
    phases: dict[str, dict[str, records.Record]] = {}
    held = {}
    for record in records.read(folder / "records.jsonl"):
        if record.name.startswith("simulated_bytes/"):
            phases.setdefault(record.settings["phase"], {})[record.name.split("/")[1]] = record
        else:
            held[record.name] = record.value
    return phases, held


def check(folder: Path, *, slack: int) -> dict[str, Any]:
    """Live is planned in every phase, all that is alive is resident, and little else ever was."""
    phases, held = measured(folder)
    assert tuple(phases) == PHASES
    for kinds in phases.values():
        assert tuple(kinds) == KINDS
        assert {kind: record.value for kind, record in kinds.items()} == {
            kind: record.settings["planned"] for kind, record in kinds.items()
        }
    last = {kind: record.value for kind, record in phases[PHASES[-1]].items()}
    alive = sum(last.values())
    # A tensor that was never written to would not be resident; one more copy of anything would be.
    assert alive <= held["simulated_resident"] <= alive + slack
    assert held["simulated_peak_resident"] <= alive + slack
    return last


@pytest.mark.parametrize("rank", shortened([0, 63], 63))
def test_a_rank_of_64_of_a_billion_parameters(tmp_path: Path, rank: int) -> None:
    done = simulate(tmp_path, TINYLLAMA, 64, "--rank", str(rank))
    assert done.returncode == 0, done.stdout + done.stderr
    last = check(tmp_path, slack=200 * 2**20)  # code and buffers of the libraries, whatever the model
    expected = state_bytes(Architecture.from_config(require(TINYLLAMA)).shape, sampled=range(2), world_size=64)
    assert last == expected | {"buckets": last["buckets"]}
    assert last["weights"] == 34_376_512
    assert f"rank {rank} of 64" in done.stdout


@pytest.mark.more
def test_sizes_that_do_not_divide_and_other_formats_of_state(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 26,
        "intermediate_size": 37,
        "num_hidden_layers": 5,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    lisa = ["num_sampled_layers=3", "optimizer.moments=int8", "optimizer.precision=stochastic_rounding"]
    done = simulate(tmp_path, "config.json", 1000, "--rank", "999", "--lisa", *lisa)
    assert done.returncode == 0, done.stdout + done.stderr
    phases, _ = measured(tmp_path)
    last = {kind: record.value for kind, record in phases[PHASES[-1]].items()}
    assert (last["master"], last["exp_avg"] > 0) == (0, True)
    wrong = state_bytes(Architecture.from_config(config).shape, sampled=range(3), world_size=1000)
    assert last["exp_avg"] != wrong["exp_avg"]  # control: fp32 moments are told from 8-bit ones


def test_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    done = simulate(tmp_path, "meta-llama/Llama-2-70", 64)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: meta-llama/Llama-2-70: is not one of the ")
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "world_size", "weights"),
    [
        (LLAMA_2_70B, 64, 2_155_520_256),
        (LLAMA_3_70B, 64, 2_204_803_328),
        (LLAMA_2_70B, 16, 8_622_081_024),
        (LLAMA_3_70B, 16, 8_819_213_312),
    ],
)
def test_a_rank_of_a_70b_model(tmp_path: Path, model: str, world_size: int, weights: int) -> None:
    available = int((Path("/proc/meminfo").read_text()).split("MemAvailable:")[1].split()[0]) * 1024
    needed = 3 * weights // 2 + 4 * 2**30
    if available < needed:
        pytest.skip(f"takes {needed / 2**30:.0f} GiB of free memory, there are {available / 2**30:.0f}")
    done = simulate(tmp_path, model, world_size, timeout_s=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    last = check(
        tmp_path, slack=2**30
    )  # a weight that DeepSpeed gathers to register its hook, at most 2.1 GB, comes early
    assert last["weights"] == weights
