"""Sizes of public models, so that a plan needs neither the hub nor a download.

The keys are those of each model's ``config.json``; keys that decide no size are left out.
"""

from __future__ import annotations

import difflib
from typing import Any

from lisa_ds.errors import ModelError


def _sizes(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, key: int, vocab: int, **more: Any
) -> Any:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **more,
    }


_TIED = {"tie_word_embeddings": True}

CATALOGUE: dict[str, dict[str, Any]] = {
    "bigscience/bloom-560m": {
        "model_type": "bloom",
        "hidden_size": 1024,
        "n_layer": 24,
        "n_head": 16,
        "vocab_size": 250880,
    },
    "bigscience/bloom-7b1": {
        "model_type": "bloom",
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
        "vocab_size": 250880,
    },
    "HuggingFaceTB/SmolLM2-135M": _sizes("llama", 576, 1536, 30, 9, 3, 49152, **_TIED),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _sizes("llama", 2048, 5632, 22, 32, 4, 32000),
    "meta-llama/Llama-2-7b-hf": _sizes("llama", 4096, 11008, 32, 32, 32, 32000),
    "meta-llama/Llama-2-13b-hf": _sizes("llama", 5120, 13824, 40, 40, 40, 32000),
    "meta-llama/Llama-2-70b-hf": _sizes("llama", 8192, 28672, 80, 64, 8, 32000),
    "meta-llama/Llama-3.1-8B": _sizes("llama", 4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Llama-3.1-70B": _sizes("llama", 8192, 28672, 80, 64, 8, 128256),
    "meta-llama/Llama-3.1-405B": _sizes("llama", 16384, 53248, 126, 128, 8, 128256),
    "meta-llama/Llama-3.2-1B": _sizes("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **_TIED),
    "meta-llama/Llama-3.2-3B": _sizes("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **_TIED),
    "mistralai/Mistral-7B-v0.1": _sizes("mistral", 4096, 14336, 32, 32, 8, 32000),
    "mistralai/Mistral-7B-v0.3": _sizes("mistral", 4096, 14336, 32, 32, 8, 32768),
    "mistralai/Mixtral-8x7B-v0.1": _sizes(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "Qwen/Qwen2.5-0.5B": _sizes("qwen2", 896, 4864, 24, 14, 2, 151936, **_TIED),
    "Qwen/Qwen2.5-1.5B": _sizes("qwen2", 1536, 8960, 28, 12, 2, 151936, **_TIED),
    "Qwen/Qwen2.5-7B": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-14B": _sizes("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "Qwen/Qwen2.5-32B": _sizes("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "Qwen/Qwen2.5-72B": _sizes("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "Qwen/Qwen3-8B": _sizes("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "google/gemma-2b": _sizes("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256, **_TIED),
    "google/gemma-7b": _sizes("gemma", 3072, 24576, 28, 16, 16, 256000, head_dim=256, **_TIED),
    "microsoft/phi-2": _sizes("phi", 2560, 10240, 32, 32, 32, 51200),
    "microsoft/Phi-3-mini-4k-instruct": _sizes("phi3", 3072, 8192, 32, 32, 32, 32064),
    "allenai/OLMo-2-1124-7B": _sizes("olmo2", 4096, 11008, 32, 32, 32, 100352),
    "EleutherAI/gpt-neox-20b": _sizes("gpt_neox", 6144, 24576, 44, 64, 64, 50432),
    "openai-community/gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "openai-community/gpt2-xl": {
        "model_type": "gpt2",
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "vocab_size": 50257,
    },
}
"""Hub name to config."""

_SAME = {
    "builtin:smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M",
}
_SUFFIXES = ("-Instruct", "-chat-hf", "-Chat", "-it", "-instruct")


def find(name: str) -> dict[str, Any] | None:
    """The config of a public model by its hub name, with or without the owner; None if it is not here.

    A tuned variant (``-Instruct``, ``-chat-hf``, ``-it``) has the sizes of its base model.
    """
    name = _SAME.get(name, name)
    variants = [name]
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            variants += [name.removesuffix(suffix), name.removesuffix(suffix) + "-hf"]
    for wanted in variants:
        for known, config in CATALOGUE.items():
            if wanted.lower() in (known.lower(), known.split("/")[1].lower()):
                return config
    return None


def require(name: str) -> dict[str, Any]:
    """As :func:`find`, but the model must be here.

    Raises:
        ModelError: It is not here; the message names similar ones.
    """
    if (config := find(name)) is None:
        short = {known.split("/")[1].lower(): known for known in CATALOGUE}
        near = difflib.get_close_matches(name.split("/")[-1].lower(), short, n=2, cutoff=0.5)
        meant = f"; did you mean {' or '.join(short[n] for n in near)}?" if near else ""
        raise ModelError(f"{name}: is not one of the {len(CATALOGUE)} models that are built in{meant}")
    return config
