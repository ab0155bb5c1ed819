"""Adapters of every supported kind on tiny bases, with values that no initialisation gives them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models import causal_models

IDS = torch.arange(5, 21)[None]


@dataclass(frozen=True)
class Case:
    """A base model and the settings of an adapter for it."""

    base: str = "llama"
    lora: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    """Changes to the base's config."""
    files: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """What else than transformers' names the base's file has."""
    shards: str = "5GB"


def _as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's file: without prefix, and with the causal masks."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def _head_twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ON_GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}

CASES = {
    "lora": Case(),
    "all linears, ranks of their own": Case(
        lora={"target_modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 64}}
    ),
    "rslora": Case(lora={"use_rslora": True, "lora_alpha": 3}),
    "dora": Case(lora={"use_dora": True, "target_modules": ALL}),
    "gaussian, some layers": Case(lora={"init_lora_weights": "gaussian", "layers_to_transform": [1]}),
    "orthogonal": Case(lora={"init_lora_weights": "orthogonal"}),
    "shards": Case(shards="20KB"),
    "conv1d": Case("gpt2", ON_GPT2),
    "conv1d as published": Case("gpt2", ON_GPT2, files=_as_published),
    "conv1d, dora": Case("gpt2", {**ON_GPT2, "use_dora": True}),
    "embeddings": Case(lora={"target_modules": ["q_proj", "embed_tokens"]}),
    "embeddings, dora": Case(lora={"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "a head to save": Case(lora={"modules_to_save": ["lm_head"]}),
    "a block's part to save": Case(lora={"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "biases of adapted layers": Case("qwen2", {"bias": "lora_only"}),
    "all biases": Case("gpt2", {**ON_GPT2, "bias": "all"}),
    "beside experts": Case("mixtral"),
}
"""Where PEFT's own merge in fp32 is right."""

TIED = {
    "embeddings": Case(lora={"target_modules": ["q_proj", "embed_tokens"]}, shape={"tie_word_embeddings": True}),
    "head": Case(lora={"target_modules": ["q_proj", "lm_head"]}, shape={"tie_word_embeddings": True}),
    "head to save": Case(lora={"modules_to_save": ["lm_head"]}, shape={"tie_word_embeddings": True}),
    "embeddings to save, gpt2": Case("gpt2", {**ON_GPT2, "modules_to_save": ["wte"]}, files=_as_published),
    "both in the file": Case(
        lora={"target_modules": ["q_proj", "embed_tokens"]}, shape={"tie_word_embeddings": True}, files=_head_twice
    ),
}
"""Where a changed weight is tied to another, which stays."""


def build(case: Case, root: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write ``root/base`` and ``root/adapter``; returns the PEFT model as it was when it was saved."""
    shape = {"tie_word_embeddings": False} if case.base == "llama" else {}
    base = causal_models.build(case.base, vocab_size=260, **{**shape, **case.shape}).to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():  # away from zero, where all logits would be alike
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    base.config.use_cache = True
    base.save_pretrained(root / "base", max_shard_size=case.shards)
    tiny.tokenizer().save_pretrained(root / "base")
    if case.files is not None:
        file = root / "base" / "model.safetensors"
        save_file(case.files(dict(load_file(file))), file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=dtype)
    return adapt(model, case.lora, root / "adapter", base=str(root / "base"))


def adapt(model: Any, settings: dict[str, Any], adapter: Path, base: str) -> Any:
    """Wrap ``model``, give the adapter random values, and save it."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        whole = peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **settings})).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        whole.peft_config["default"].base_model_name_or_path = base
        whole.save_pretrained(adapter)
    return whole


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def greedy(model: Any) -> list[int]:
    with torch.no_grad():
        found: list[int] = model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
    return found


def load(directory: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **settings).eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}
