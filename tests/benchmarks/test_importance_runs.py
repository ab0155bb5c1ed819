"""Importance sampling from the command line: the calibration recipe for a classifier and a language model, and `lisa-ds profile`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

from lisa_ds.cli import main
from lisa_ds.sampling.scores import LayerScores
from tests import tiny
from tests.training_runs import launch, write_run

RECIPE = {"name": "grad_norm", "score": "accumulated", "draw": "successive", "calibration_batches": 2, "every": 1}


def write_classifier(folder: Path) -> Path:
    write_run(
        folder,
        model={"name_or_path": "bert", "task": "sequence_classification"},
        data={"path": "labelled.jsonl", "eval_fraction": 0.25, "max_length": 32},
        lisa={"sampling_ratio": 0.5, "interval_steps": 2, "sampler": RECIPE},
        training={
            **{"output_dir": "out", "max_steps": 8, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2},
            **{"per_device_train_batch_size": 4, "report_to": "none"},
        },
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    bert = BertForSequenceClassification(BertConfig(vocab_size=260, max_position_embeddings=64, num_labels=2, **sizes))
    bert.save_pretrained(folder / "bert")
    tiny.tokenizer().save_pretrained(folder / "bert")
    tiny.write_rows(
        folder / "labelled.jsonl", lambda i: {"text": ("even " if i % 2 else "odd ") * 3 + str(i), "label": i % 2}, 64
    )
    return folder


def write_language_model(folder: Path) -> Path:
    write_run(folder)
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run["lisa"] = {"sampling_ratio": 0.5, "interval_steps": 2, "sampler": RECIPE}
    run["training"] |= {"report_to": "none", "max_steps": 8}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.mark.multirank
@pytest.mark.parametrize("write", [write_classifier, pytest.param(write_language_model, marks=pytest.mark.nightly)])
def test_the_calibration_recipe_from_end_to_end(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    done = launch(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = done.stdout.split("\nheld-out loss ")[1].split("\n")[0].split(" -> ")
    assert float(after) < float(before)
    assert " in 4 intervals" in done.stdout
    lines = [json.loads(line) for line in (folder / "out/layers.jsonl").read_text().splitlines()]
    chances = [line["probabilities"] for line in lines if line["kind"] == "recording"]
    assert len(chances) == 4
    assert all(sum(row) == pytest.approx(2) for row in chances)  # half of four blocks
    assert all(len({round(chance, 4) for chance in row}) > 1 for row in chances)  # not uniform
    assert chances[0] != chances[-1]  # scored anew
    if write is write_classifier:  # one of them is enough
        return
    # Resumed amid an interval it goes on exactly.
    whole = (folder / "out/model/model.safetensors").read_bytes()
    resumed = launch(folder, "--resume", "out/checkpoint-3")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (folder / "out/model/model.safetensors").read_bytes() == whole


@pytest.mark.nightly
@pytest.mark.multirank
def test_a_profile_is_what_a_run_draws_by(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "run")
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "LISA_DS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "lisa_ds.cli", "profile", "--lisa_config", "run.yaml", "--out"]
    found = {}
    for score in ("mean", "weight_norm"):
        done = subprocess.run(
            [*command, f"{score}.json", "--score", score, "lisa.interval_steps=1epoch"],
            **{"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 200},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"wrote {score}.json" in done.stdout
        found[score] = LayerScores.read(folder / f"{score}.json")
        assert len(found[score].scores) == 4
        assert min(found[score].scores) > 0
    assert found["mean"].score == "grad_norm/mean"
    assert found["mean"].scores != found["weight_norm"].scores
    assert not (folder / "out").exists()
    again = subprocess.run(
        [*command, "mean.json"],
        **{"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 200},
    )
    assert again.returncode == 2
    assert "--out: mean.json exists already" in again.stderr
    done = launch(folder, "lisa.sampler={name: fixed_scores, file: mean.json, temperature: 0.05}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "out/layers.jsonl").read_text().splitlines()]
    chances = [line["probabilities"] for line in lines if line["kind"] == "recording"]
    assert all(row == chances[0] for row in chances)
    best = max(range(4), key=found["mean"].scores.__getitem__)
    assert chances[0][best] == max(chances[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lisa.sampler={name: fixed_scores, file: nothing.json}", "nothing.json: cannot be read: No such file"),
        (
            "lisa.sampler={name: weight_norm, lora_norms: a.jsonl, full_norms: b.jsonl}",
            "a.jsonl: no layer statistics can be read",
        ),
        (
            "lisa.sampler={name: grad_norm, calibration_batches: 0}",
            "lisa.sampler.calibration_batches: should be greater than",
        ),
    ],
)
def test_a_sampler_that_cannot_draw_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    from lisa_ds.train import command

    monkeypatch.chdir(write_run(tmp_path / "run"))
    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }.items():
        monkeypatch.setenv(key, value)
    assert command.main(["--lisa_config", "run.yaml", override]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_profile_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--help"]) == 0
    assert "--score" in capsys.readouterr().out
