"""Saved adapters are refused before weights are read if they are damaged or incomplete, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lisa_ds.checkpoint import adapters, merge
from lisa_ds.cli import main
from lisa_ds.config import ModelConfig
from lisa_ds.errors import CheckpointError, ModelError
from lisa_ds.models import skeleton
from tests.checkpoint.adapter_cases import CASES, TIED, build, load, logits

SHORT = ("lora", "dora", "conv1d", "a head to save")


def without_one(file: Path) -> str:
    weights = load_file(file)
    missing = next(name for name in weights if "lora_B" in name)
    del weights[missing]
    save_file(weights, file, {"format": "pt"})
    return missing


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.more) for name in {**CASES, **TIED}]
)
def test_every_kind_is_taken_whole_and_refused_without_a_part(name: str, tmp_path: Path) -> None:
    model = build({**CASES, **TIED}[name], tmp_path)
    base = skeleton(ModelConfig(name_or_path=str(tmp_path / "base")))
    before = [type(module) for module in base.modules()]
    adapters.check(base, tmp_path / "adapter")
    assert [type(module) for module in base.modules()] == before
    found = adapters.loaded(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits(found), logits(model))
    without_one(tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter: lacks .*lora_.*, which adapter_config\.json asks for"):
        adapters.check(base, tmp_path / "adapter")


def test_merging_and_loading_refuse_in_the_same_words(tmp_path: Path) -> None:
    build(CASES["lora"], tmp_path)
    missing = without_one(tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks {missing}, which adapter_config\.json asks for"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_with_a_classifier_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(CASES["lora"], tmp_path)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(file.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"lisa-ds: error: {file}: task_type is SEQ_CLS, and an adapter with a classifier cannot be merged in files; load it with PEFT "
        "beside its base, or merge it there: merge_and_unload()\n"
    )


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": "llama", "architectures": ["NoSuchModel"]}'])
def test_a_base_with_a_damaged_config_is_one_line(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(CASES["lora"], tmp_path)
    (tmp_path / "base/config.json").write_text(config)
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lisa-ds: error: {tmp_path}/base")
    assert said.count("\n") == 1
