"""A model, a tokenizer and rows small enough to train in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]


def tokenizer() -> Any:
    """Bytes, and the marks of a conversation."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT,
    )


def config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaConfig(
        **{
            "vocab_size": 260,
            **sizes,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            "initializer_range": 0.2,  # at the default 0.02 all logits are near zero, and every model answers alike
            **changes,
        }
    )


def write_model(directory: Path, **changes: Any) -> Path:
    """A random model with its tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(**changes)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_rows(path: Path, make: Any, count: int = 24) -> Path:
    path.write_text("".join(json.dumps(make(i)) + "\n" for i in range(count)))
    return path


def text(i: int) -> dict[str, str]:
    return {"text": f"{i} and {i} make {i + i}"}


def pair(i: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"{i} + {i}?"}],
        "completion": [{"role": "assistant", "content": f"It is {i + i}."}],
    }


def alpaca(i: int) -> dict[str, str]:
    return {"instruction": f"{i} + {i}?", "input": "", "output": f"It is {i + i}."}
