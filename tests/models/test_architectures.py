"""Shapes from a config alone: those of transformers' own models, and the published sizes of public ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lisa_ds.config.targets import chosen
from lisa_ds.errors import ModelError
from lisa_ds.layers import LayerStack
from lisa_ds.memory import Architecture, ModelShape, catalogue
from lisa_ds.memory.architectures import KINDS_OF_MODEL
from lisa_ds.models.linears import all_linears

PUBLISHED = {  # parameters, as each model's safetensors index says
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "openai-community/gpt2": 124_439_808,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-7b1": 7_069_016_064,
    "openai-community/gpt2-xl": 1_557_611_200,
}


def built(config: dict[str, Any]) -> ModelShape:
    """The shape of the model that transformers builds from ``config``."""
    kind = config["model_type"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stack = LayerStack.from_model(model)
    assert kind == model.config.model_type
    return ModelShape.from_numels(stack.numels(), tied=stack.tied)


def unordered(shape: ModelShape) -> dict[str, Any]:
    """Units as bags of sizes: modules run in another order than they are registered."""
    fields = dataclasses.asdict(shape)
    roles = {role: sorted(fields[role]) for role in ("embeddings", "lm_head", "rest")}
    return {**fields, **roles, "layers": [sorted(layer) for layer in fields["layers"]]}


@pytest.mark.parametrize("name", sorted(catalogue.CATALOGUE))
def test_a_public_model_has_its_published_size(name: str) -> None:
    assert Architecture.from_config(catalogue.require(name)).num_parameters == PUBLISHED[name]


SMALL = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80}
SMALL |= {"num_hidden_layers": 3, "vocab_size": 97}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    **{kind: [SMALL, SMALL | {"tie_word_embeddings": True}] for kind in ("mistral", "qwen2", "olmo2")},
    "phi3": [SMALL | {"pad_token_id": 0}],
    "llama": [
        SMALL,
        SMALL | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    ],
    "qwen3": [SMALL | {"head_dim": 8, "attention_bias": True}],
    "gemma": [SMALL | {"head_dim": 20}, SMALL | {"tie_word_embeddings": False}],
    "gemma2": [SMALL | {"head_dim": 20}],
    "mixtral": [SMALL | {"num_local_experts": 3}],
    "gpt2": [{"n_embd": 48, "n_head": 4, "n_layer": 2, "vocab_size": 97, "n_positions": 32}],
    "bloom": [{"hidden_size": 48, "n_head": 4, "n_layer": 2, "vocab_size": 97}],
    "gpt_neox": [SMALL, SMALL | {"attention_bias": False}],
    "opt": [SMALL | {"ffn_dim": 80, "word_embed_proj_dim": 48, "max_position_embeddings": 32}],
    "phi": [SMALL | {"num_key_value_heads": 4}],
}


def test_every_architecture_is_held_to_transformers() -> None:
    assert sorted(VARIANTS) == sorted(KINDS_OF_MODEL)


@pytest.mark.parametrize(
    ("kind", "config"), [(kind, config) for kind, configs in VARIANTS.items() for config in configs]
)
def test_shapes_are_those_that_transformers_builds(kind: str, config: dict[str, Any]) -> None:
    config = {"model_type": kind, **config}
    if config.get("head_dim") is None and kind in ("gemma", "gemma2"):
        config["head_dim"] = 256
    assert unordered(Architecture.from_config(config).shape) == unordered(built(config))


@pytest.mark.parametrize("targets", ["all-linear", ["dense", "q_proj", "mlp.c_fc"], r".*\.[1]\..*"], ids=str)
@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_linears_are_those_that_methods_find_in_the_model(kind: str, targets: Any) -> None:
    config = {"model_type": kind, **VARIANTS[kind][0]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    architecture = Architecture.from_config({**config, "head_dim": getattr(model.config, "head_dim", None)})
    for inside in (False, True):
        found = {p: m for p, m in all_linears(model, conv1d=True).items() if chosen(targets, p, inside=inside)}
        shapes = [
            tuple(reversed(m.weight.shape)) if isinstance(m, Conv1D) else tuple(m.weight.shape) for m in found.values()
        ]
        assert sorted(architecture.linears(targets, inside=inside, conv1d=True)) == sorted(shapes)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B", "google/gemma-2b", "microsoft/Phi-3-mini-4k-instruct"])
def test_a_full_size_model_is_that_of_transformers(name: str) -> None:
    config = catalogue.require(name)
    assert unordered(Architecture.from_config(config).shape) == unordered(built(config))


def test_names_of_variants_lead_to_their_base() -> None:
    for name in ("Qwen2.5-7B-Instruct", "meta-llama/Llama-2-7b-chat-hf", "builtin:smollm2-135m", "gemma-2b-it"):
        assert catalogue.find(name) is not None, name
    with pytest.raises(ModelError, match=r"LLama-2-7c-hf: is not one of the .* did you mean meta-llama/Llama-2-7b-hf"):
        catalogue.require("LLama-2-7c-hf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "x.json: model_type: the planner knows bloom, .* got 'None'"),
        ({"model_type": "llama", "hidden_size": 8}, "x.json: intermediate_size: required to plan a 'llama' model"),
        ({**SMALL, "model_type": "llama", "hidden_size": "48"}, "x.json: a size is not a number"),
    ],
)
def test_what_cannot_be_planned_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Architecture.from_config(config, "x.json")


def test_a_local_config_of_a_saved_model_is_read(tmp_path: Path) -> None:
    from tests import tiny

    tiny.write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert unordered(Architecture.from_config(config).shape) == unordered(built(config))
