"""What `initialize` and `attach` are given: what is none of it is named, and ranks that no launcher has counted are found."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

import lisa_ds
from lisa_ds.cluster.environment import free_port
from lisa_ds.engines.zero3 import arguments
from tests import tiny

DEEPSPEED = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
AS_IN = 'lisa_ds.initialize(model=model, config="ds_zero3.json", lisa_config={"num_sampled_layers": 2})'
MODEL = LlamaForCausalLM(tiny.config())


class Engine:
    """A trainer of somebody else's."""

    train_dataset = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, f"initialize: there is no model to train; give it, as in {AS_IN}"),
        ({"args": MODEL, "model": None}, f"initialize: the first argument is args, as in deepspeed.initialize; name the model: {AS_IN}"),
        ({"model": "gpt2"}, "initialize: model should be a model, got str: gpt2; load it first: AutoModelForCausalLM.from_pretrained(...)"),
        ({"model": LlamaForCausalLM}, "initialize: model should be a model, got the class LlamaForCausalLM; give an instance of it"),
        ({"model": Engine()}, "; a trainer goes to lisa_ds.attach(trainer, ...)"),
        ({"model": {}}, "initialize: model should be a model, got dict: {}; give a torch.nn.Module"),
        (
            {"optimizer": "adamw"},
            "initialize: optimizer should be a torch optimizer or a function that makes one, got str: adamw; name one in the "
            "config's optimizer section, or build it",
        ),
        ({"model_parameters": 3}, "initialize: model_parameters should be parameters or groups of them, got int: 3; leave it out for all of the model's"),
        ({"model_parameters": {"lr": 1}}, "initialize: model_parameters should be parameters or groups of them, got dict: {'lr': 1}; "),
        ({"lr_scheduler": "cosine"}, "initialize: lr_scheduler should be a scheduler or a function that makes one, got str: cosine; "),
        ({"calibration": [1]}, "initialize: calibration should be a function that is given the model and yields losses, got list: [1]"),
        ({"config": None}, f"initialize: there is no DeepSpeed config; give its keys or its file, as in {AS_IN}"),
        ({"config": "none.json"}, "config: none.json: no such file (looked from "),
        ({"config": None, "config_params": "none.json"}, "config: none.json: no such file (looked from "),
        ({"config": Path("broken.json")}, "config: broken.json: cannot be read as JSON: "),
        ({"config": "list.json"}, "config: list.json: should hold keys and values, got list"),
        ({"config": "."}, "config: .: cannot be read as JSON: [Errno 21] Is a directory: '.'"),
        ({"config": {**DEEPSPEED, "gradient_clippping": 1}}, "config: gradient_clippping: DeepSpeed "),
        ({"config": {**DEEPSPEED, "bf16": [1]}}, "config: DeepSpeed cannot read it: "),
        ({"config": "misspelt.json"}, "config: misspelt.json: gradient_clippping: DeepSpeed "),
        (
            {"args": argparse.Namespace(deepspeed_config="misspelt.json"), "config": None},
            "config: misspelt.json: gradient_clippping: DeepSpeed ",
        ),
        ({"config": 3}, "config: should be a dict or the path of a JSON file, got int: 3"),
        ({"config": [1]}, "config: should be a dict or the path of a JSON file, got list: [1]"),
        (
            {"args": argparse.Namespace(deepspeed_config="a.json")},
            "initialize: a DeepSpeed config is given twice, as config and as args.deepspeed_config; keep one",
        ),
        ({"args": argparse.Namespace(deepspeed_config="none.json"), "config": None}, "config: none.json: no such file (looked from "),
        ({"lisa_config": 3}, "lisa_config: should be a LisaConfig, a dict or the path of a file, got int"),
        ({"lisa_config": "none.yaml"}, "none.yaml: no such file (looked from "),
    ],
)  # fmt: skip
def test_initialize_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"a": 1')
    Path("list.json").write_text("[1]")
    Path("misspelt.json").write_text(json.dumps({**DEEPSPEED, "gradient_clippping": 1}))
    before = dict(os.environ)
    with pytest.raises(lisa_ds.LisaError) as caught:
        lisa_ds.initialize(**{"model": MODEL, "config": DEEPSPEED, "lisa_config": {}, **given})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("trainer", "got"),
    [
        (
            MODEL,
            "LlamaForCausalLM; build one with it, Trainer(model, args=...), or use lisa_ds.initialize(model=model, ...) in a loop "
            "of your own",
        ),
        (None, "NoneType; as in lisa_ds.attach(trainer, {'num_sampled_layers': 2})"),
        (Trainer, "the class Trainer; give an instance of it"),
        ({"num_sampled_layers": 2}, "dict; as in lisa_ds.attach(trainer, {'num_sampled_layers': 2})"),
        ("run.yaml", "str; as in lisa_ds.attach(trainer, {'num_sampled_layers': 2})"),
        (torch.nn.Linear(1, 1), "Linear; build one with it, Trainer(model, args=...), or use "),
    ],
)
def test_attach_takes_a_trainer(trainer: Any, got: str) -> None:
    with pytest.raises(lisa_ds.LisaError) as caught:
        lisa_ds.attach(trainer, {})
    assert str(caught.value).startswith(f"attach: takes a transformers.Trainer, or one of TRL's, got {got}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (3, "lisa_config: should be a LisaConfig, a dict or the path of a file, got int"),
        (["num_sampled_layers"], "lisa_config: should be a LisaConfig, a dict or the path of a file, got list"),
        ({1: 2}, "lisa_config: 1: Keys should be strings, got 1"),
        ({"num_layers": 2}, "lisa_config: num_layers: unknown key, got 2"),
        (".", ".: cannot be read as text: [Errno 21] Is a directory: '.'"),
    ],
)
def test_attach_and_initialize_take_a_lisa_section(config: Any, message: str) -> None:
    for call in (lambda: lisa_ds.attach(None, config), lambda: lisa_ds.initialize(model=MODEL, lisa_config=config)):
        with pytest.raises(lisa_ds.LisaError) as caught:
            call()
        assert str(caught.value).startswith(message)


SCRIPT = f"""
import torch, lisa_ds
from tests import tiny
from transformers import LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(tiny.config())
config = {DEEPSPEED} | {{"zero_allow_untested_optimizer": True}}
engine, *_ = lisa_ds.initialize(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), lisa_config={{}})
rows = torch.arange(16)[None]
for _ in range(2):
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
print(torch.distributed.get_rank(), "of", torch.distributed.get_world_size(), engine.sampled_layers)
torch.distributed.destroy_process_group()
"""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OMPI = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")]


def scripts(*environments: dict[str, str]) -> list[subprocess.Popen[str]]:
    base = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    base |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    base["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{base.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", SCRIPT]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=base | more, **pipes) for more in environments]


@pytest.mark.multirank
@pytest.mark.more
def test_initialize_works_without_a_launcher_and_under_others() -> None:
    port = str(free_port())
    mpi = [dict(zip(OMPI, (rank, rank, "2", "2"), strict=True)) | {"MASTER_PORT": port} for rank in "01"]
    half = {"RANK": "0", "WORLD_SIZE": "2"}
    started = scripts({}, *mpi, half)
    told = [process.communicate(timeout=300) for process in started]
    lines = [out.splitlines()[-1] if out else "" for out, _ in told]
    assert lines[0].startswith("0 of 1 "), told[0][1]
    assert [line[:6] for line in lines[1:3]] == ["0 of 2", "1 of 2"], told[1][1]
    assert lines[1][6:] == lines[2][6:]
    assert "ClusterError" in told[3][1]
    for name in ("LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        assert f"{name}: should be " in told[3][1]


def test_what_clouds_and_mpi4py_know_is_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZUREML_EXPERIMENT_ID", "1")
    arguments.find_ranks(required=None)
    assert "RANK" not in os.environ
    monkeypatch.delenv("AZUREML_EXPERIMENT_ID")
    arguments.find_ranks(required=False)
    assert "RANK" not in os.environ
