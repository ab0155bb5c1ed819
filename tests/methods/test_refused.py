"""What methods refuse before any weight is read, word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from lisa_ds import methods
from lisa_ds.config import load_config
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.models import skeleton
from lisa_ds.train import checks
from tests import tiny

ADAPTER = {"method": "lora", "lora": {"adapter": "adapter"}}
ZERO2 = {"zero_optimization": {"stage": 2}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"method": "lora", "lora": {"targets": ["query"]}},
        "lora.targets: names no linear of 'model', got ['query']; its linears are called q_proj, k_proj, v_proj, o_proj, gate_proj, "
        "up_proj, down_proj",
    ),
    (
        {"method": "lora", "lora": {"dora": True}},
        "lora.dora: DoRA computes with whole weights outside of their modules, of which ZeRO-3 gives a rank a slice, got True; set "
        "deepspeed.zero_optimization.stage to 2, or dora to false",
    ),
    (ADAPTER, "lora.adapter: should be the directory of a saved adapter, got 'adapter', which has no adapter_config.json"),
    (
        {"method": "lora", "deepspeed": {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 3}}},
        "deepspeed: tensor_parallel.autotp_size: AutoTP splits linears and knows no adapters; use method 'lisa' or 'full', or remove it",
    ),
    (
        {"method": "lora", "deepspeed": {"zero_optimization": {"stage": 1}}},
        "deepspeed: zero_optimization.stage: method 'lora' shards its state under ZeRO-3 or ZeRO-2, got 1; set it to 3",
    ),
    (
        {"method": "lisa", "deepspeed": ZERO2},
        "deepspeed: zero_optimization.stage: method 'lisa' shards its state under ZeRO-3, got 2; set it to 3",
    ),
    (
        {"method": "galore", "deepspeed": ZERO2},
        "deepspeed: GaLore projects whole gradients, of which ZeRO gives a rank a slice; leave it out (deepspeed=null): every rank "
        "holds the whole model",
    ),
    (
        {"method": "galore", "galore": {"targets": "layers"}},
        "galore.targets: names no linear of 'model', got 'layers'; its linears are called q_proj, k_proj, v_proj, o_proj, gate_proj, "
        "up_proj, down_proj",
    ),
    (
        {"method": "galore", "galore": {"proj_type": "reverse_std", "rank": 16}},
        "galore.rank: galore-torch computes proj_type 'reverse_std' for ranks below the shorter side of each matrix, here 16, got 16; "
        "choose a smaller rank, or 'std'",
    ),
    (
        {"method": "galore", "galore": {"master_weights": True}},
        "galore.master_weights: is for training.bf16: true; without it all is fp32 anyway",
    ),
    (
        {"method": "galore", "galore": {"layerwise": True}, "training": {"gradient_accumulation_steps": 4}},
        "galore.layerwise: gradients are gone after each micro-batch, so it takes training.gradient_accumulation_steps: 1, got 4",
    ),
    (
        {"method": "galore", "galore": {"layerwise": True}, "training": {"max_grad_norm": 0.5}},
        "training.max_grad_norm: with galore.layerwise no norm of all gradients is known, got 0.5; leave it out or set it to 0",
    ),
    (
        {"method": "galore", "training": {"fp16": True}},
        "training.fp16: method 'galore' trains in bf16 or fp32; use training.bf16",
    ),
    (
        {"method": "galore", "training": {"optim": "galore_adamw"}},
        "training.optim: the section galore chooses the optimizer of method 'galore', got 'galore_adamw'; leave it out",
    ),
    (
        {"method": "full", "training": {"optim": "galore_adamw_8bit"}},
        "training.optim: works on whole matrices, of which ZeRO-3 gives a rank a slice, got 'galore_adamw_8bit'; choose one that works "
        "on elements, such as adamw_torch, or method: galore",
    ),
]  # fmt: skip


def refusal(folder: Path, fields: dict[str, Any]) -> str:
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.alpaca)
    run = {"model": {"name_or_path": "model"}, "data": {"path": "rows.jsonl"}, **fields}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    config = load_config("run.yaml")
    # Of the rest a device without fp16 would be the first to say no.
    check = (lambda: methods.of(config).check(config, skeleton(config.model))) if config.training.get("fp16") else None
    with pytest.raises(ConfigError) as caught:
        (check or (lambda: checks.check(config)))()
    return str(caught.value)


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: "" if isinstance(value, str) else None)
def test_a_method_names_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(tmp_path, fields) == f"run.yaml: {message}"


def test_layerwise_takes_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(tmp_path, {"method": "galore", "galore": {"layerwise": True}}) == (
        "run.yaml: galore.layerwise: parameters are stepped before ranks have averaged their gradients, so it takes one rank, got 2; set "
        "it to false, or start one"
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: {}, "lora.adapter: adapter: lacks "),
        (lambda weights: {name: torch.zeros(2, 2) for name in weights}, "lora.adapter: adapter: the adapter cannot be read, or does"),
    ],
)  # fmt: skip
def test_a_saved_adapter_that_does_not_fit_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    base = LlamaForCausalLM(tiny.config())
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file(spoil(load_file(file)), file, {"format": "pt"})
    assert refusal(tmp_path, ADAPTER).startswith(f"run.yaml: {message}")


def test_a_saved_classifier_has_as_many_classes_as_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_model(tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained("model", num_labels=3)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    peft.get_peft_model(base, lora).save_pretrained("adapter")
    model = {"name_or_path": "model", "task": "sequence_classification"}
    for fields in ({}, {"num_labels": 3}):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model | fields, "data": {"path": "d"}, **ADAPTER}))
        config = load_config("run.yaml")
        methods.of(config).check(config, skeleton(config.model))
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"model": {**model, "num_labels": 4}, "data": {"path": "d"}, **ADAPTER})
    )
    config = load_config("run.yaml")
    with pytest.raises(ModelError) as caught:
        methods.of(config).check(config, skeleton(config.model))
    assert str(caught.value) == (
        "run.yaml: model.num_labels: the adapter in adapter tells 3 classes apart, got 4; leave it out"
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"lora": {"rank": 0}}, "lora.rank: should be greater than or equal to 1, got 0"),
        ({"lora": {"r": 8}}, "lora.r: unknown key, got 8"),
        ({"lora": {"targets": []}}, "lora.targets: should be 'all-linear', a list of names, or a regular expression, got []"),
        ({"lora": {"targets": "(q_proj"}}, "lora.targets: is no regular expression: missing ), unterminated subpattern at position 0"),
        (
            {"lora": {"adapter": "a", "rank": 8}},
            "lora: adapter has settings of its own, in its adapter_config.json: leave out rank",
        ),
        ({"galore": {"scale": -1.0}}, "galore.scale: should be greater than 0, got -1.0"),
        ({"galore": {"proj_type": "svd"}}, "galore.proj_type: should be 'std', 'reverse_std', 'right', 'left' or 'full', got 'svd'"),
        ({"method": "qlora"}, "method: should be 'lisa', 'full', 'lora' or 'galore', got 'qlora'"),
    ],
)  # fmt: skip
def test_sections_are_checked_whatever_the_method(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": {"name_or_path": "m"}, "data": {"path": "d"}, **section}))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: {message}")
