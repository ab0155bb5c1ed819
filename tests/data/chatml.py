"""Tokenizers as SmolLM2's and BERT's are, and rows that they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset, preview

# As SmolLM2's: nothing marks an answer, and a line break follows the token that ends a turn.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Bytes, and merges of letters and of line breaks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["\n\n\n\n"] * 9 + ["the answer is seven"] * 9, trainer)
    return tokenizer


@pytest.fixture
def tokenizer(bpe: Tokenizer) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture
def base_tokenizer(bpe: Tokenizer) -> Any:
    """Of a base model: no chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture
def uncased() -> Any:
    """Loses case and spacing, so that what it decodes is not what it was given; adds [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>"]
    words = [*special, "user", "assistant", "what", "is", "it", "seven", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]")


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path: str | Path, tokenizer: Any, **options: Any) -> datasets.Dataset:
    return load_dataset(DataConfig(path=str(path), **options), tokenizer)[0]


def learned(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """The stretches of text that carry loss."""
    return [part.partition("⟧")[0] for part in preview(row, tokenizer).split("⟦")[1:]]


def as_stored(messages: list[dict[str, str]]) -> dict[str, str]:
    """A row as the tokeniser is given it."""
    return {"messages": json.dumps(messages), "tools": "null", "place": "here"}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]


PAIRS = [{"prompt": f"question {i}", "completion": f"the answer is {i}"} for i in range(40)]
