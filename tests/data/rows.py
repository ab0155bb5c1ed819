"""Files of rows for tests, and a tokenizer whose chat template writes all that a turn can hold."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset

# Every turn on a line: its role, its name, its thoughts in ( ), what it says, its calls in [ ].
TEMPLATE = (
    "{% if tools %}tools {{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for message in messages %}"
    "{{ message['role'] + ': ' }}"
    "{% if message['tool_call_id'] %}{{ '#' + message['tool_call_id'] + ' ' }}{% endif %}"
    "{% if message['name'] %}{{ '@' + message['name'] + ' ' }}{% endif %}"
    "{% if message['reasoning_content'] %}{{ '(' + message['reasoning_content'] + ') ' }}{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '[' + call['function']['name'] + ' ' + call['function']['arguments'] | tojson + ']' }}"
    "{% endfor %}"
    "{{ '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@cache
def _bytes() -> Tokenizer:
    special, alphabet = ["<|pad|>", "<|end|>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def tokenizer() -> Any:
    """A token for every byte."""
    made = PreTrainedTokenizerFast(tokenizer_object=_bytes(), pad_token="<|pad|>", eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


def write(path: Path, *rows: Any) -> str:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str | Path, **options: Any) -> datasets.Dataset:
    """The rows to train on."""
    return load_dataset(DataConfig(path=str(path), **options), tokenizer())[0]


def text(path: str | Path, **options: Any) -> list[str]:
    """The rows as their text."""
    return [tokenizer().decode(row["input_ids"]) for row in load(path, **options)]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
