"""Loads the model and tokenizer that a config names, or raises one message that says what is missing."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lisa_ds.cache import build_once
from lisa_ds.config import ModelConfig
from lisa_ds.config.lora import ADAPTER_CONFIG
from lisa_ds.errors import ModelError
from lisa_ds.models import fitness, smollm2

# What transformers and the libraries below it raise for a file that is missing, or holds what they do not expect.
_REFUSALS = (
    OSError,
    ValueError,
    ImportError,
    KeyError,
    TypeError,
    AttributeError,
    SafetensorError,
    StrictDataclassError,
)

# Name after "builtin:" -> the cache entry and what fills it. The number is raised when the conversion changes.
BUILTIN = {"smollm2-135m": ("models/smollm2-135m-1", smollm2.convert)}

_KINDS: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(name_or_path: str) -> str:
    """Where ``from_pretrained`` finds the model: a directory, or a hub name, which is passed on as it is.

    A built-in model is converted on first use and kept in the cache.

    Raises:
        ModelError: An unknown built-in, or a directory that holds no model.
    """
    scheme, _, builtin = name_or_path.partition(":")
    if scheme == "builtin":
        if builtin not in BUILTIN:
            near = difflib.get_close_matches(builtin, BUILTIN, n=1, cutoff=0.3)
            known = f"did you mean 'builtin:{near[0]}'?" if near else f"there is {', '.join(map(_spell, BUILTIN))}"
            raise ModelError(f"{name_or_path}: no such built-in model; {known}")
        return str(build_once(*BUILTIN[builtin]))
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path):  # unlike pathlib's, it is no error where there can be no such name
        _check_directory(path)
        return str(path)
    if os.path.isfile(path):
        raise ModelError(f"{name_or_path}: is a file; give the directory that holds it and config.json")
    if not _HUB_NAME.fullmatch(name_or_path):
        raise ModelError(f"{name_or_path}: no such directory (looked from {Path.cwd()}){_near_directory(path)}")
    return name_or_path


def load_tokenizer(config: ModelConfig, directory: str | None = None) -> Any:
    """The model's tokenizer, able to pad.

    One without a padding token borrows its end-of-text token: padded positions are masked out of attention and
    loss anyway, and a new token would need a new row in the embedding.

    Args:
        config: Which model.
        directory: Where its tokenizer is, if not beside its weights.

    Raises:
        ModelError: There is no tokenizer, or none of its tokens can pad.
    """
    path = directory or _resolve(config)
    with _explained(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **_common(config))
    if tokenizer.pad_token is None:
        borrowed = tokenizer.eos_token or tokenizer.unk_token
        if borrowed is None:
            raise ModelError(
                f"{config.where('name_or_path')}: the tokenizer of {config.name_or_path!r} has neither pad_token, "
                f"eos_token nor unk_token, so rows cannot be padded; set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = borrowed
    tokenizer.padding_side = "right"  # for training; a checkpoint saved for generation may say left
    return tokenizer


def load_model(config: ModelConfig, dtype: torch.dtype | str | None = None) -> Any:
    """The pretrained model.

    Plain ``from_pretrained``, so that it builds partitioned parameters where transformers' ``HfDeepSpeedConfig``
    is alive.

    Args:
        config: Which model, and for which task.
        dtype: Of its weights; ``None`` takes what they are stored in.

    Raises:
        ModelError: It cannot be found or loaded, it is quantised, or it does not fit the task.
    """
    path, _ = _config_of(config)
    options: dict[str, Any] = {**_common(config), "dtype": dtype or "auto"}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.num_labels is not None:
        options["num_labels"] = config.num_labels
    with _explained(config, f"model for task {config.task!r}"):
        model = _KINDS[config.task].from_pretrained(path, **options)
    if config.task == "sequence_classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(config).pad_token_id  # else it cannot find where a row ends
    return model


def skeleton(config: ModelConfig) -> Any:
    """The model without its weights, on the meta device: only the config is read.

    Raises:
        ModelError: As :func:`load_model`.
    """
    _, shape = _config_of(config)
    if config.num_labels is not None:
        shape.num_labels = config.num_labels
    with _explained(config, f"model for task {config.task!r}"), torch.device("meta"):
        return _KINDS[config.task].from_config(shape, trust_remote_code=config.trust_remote_code)


def fitting_skeleton(config: ModelConfig) -> Any:
    """As :func:`skeleton`, but the model must be trainable for its task with the installed packages.

    Raises:
        ModelError: It is not; names the key, and what to change.
    """
    _, shape = _config_of(config)
    fitness.check_task(config, shape)
    model = skeleton(config)
    if config.attn_implementation is not None:
        try:
            with torch.device("meta"):
                _KINDS[config.task].from_config(
                    shape, trust_remote_code=config.trust_remote_code, attn_implementation=config.attn_implementation
                )
        except _REFUSALS as error:
            raise ModelError(
                f"{config.where('attn_implementation')}: cannot be had for {config.name_or_path!r} here, got "
                f"{config.attn_implementation!r}; leave it out, or use sdpa or eager: {' '.join(str(error).split())}"
            ) from error
    return model


def check_weights(config: ModelConfig) -> None:
    """Refuse a model whose weights are missing or truncated, as far as that shows without reading them.

    Raises:
        ModelError: Names the file.
    """
    fitness.check_files(config, _resolve(config))


def model_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of the model's ``config.json``, with transformers' defaults for those that it leaves out.

    Raises:
        ModelError: As :func:`load_model`.
    """
    fields: dict[str, Any] = _config_of(config)[1].to_dict()
    return fields


def _config_of(config: ModelConfig) -> tuple[str, Any]:
    path = _resolve(config)
    with _explained(config, "model"):
        shape = AutoConfig.from_pretrained(path, **_common(config))
    if getattr(shape, "quantization_config", None) is not None:
        raise ModelError(
            f"{config.where('name_or_path')}: the weights of {config.name_or_path!r} are quantised and cannot be "
            f"trained; LISA trains the weights themselves: name the checkpoint it was made from"
        )
    return path, shape


def _resolve(config: ModelConfig) -> str:
    try:
        return resolve(config.name_or_path)
    except ModelError as error:
        raise ModelError(f"{config.where('name_or_path')}: {error}") from None


def _common(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    return options if config.revision is None else {**options, "revision": config.revision}


def _check_directory(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / ADAPTER_CONFIG).is_file():
        what = "holds a LoRA adapter, not a model; merge it into its base model first: lisa-ds merge"
    else:
        nested = sorted(child.parent.name for child in path.glob("*/config.json"))
        what = "holds no config.json, so it is not a Hugging Face model directory"
        what += f"; did you mean {str(path / nested[-1])!r}?" if nested else ""
    raise ModelError(f"{path}: {what}")


def _near_directory(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return ""
    siblings = [child.name for child in path.parent.iterdir() if child.is_dir()]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def _spell(builtin: str) -> str:
    return f"builtin:{builtin}"


@contextmanager
def _explained(config: ModelConfig, what: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or unfit file into one message about the config's key."""
    try:
        yield
    except _REFUSALS as error:
        path = Path(os.path.expanduser(config.name_or_path))
        remote = config.name_or_path.partition(":")[0] != "builtin" and not os.path.isdir(path)
        hub = f" (no such directory here{_near_directory(path)}, so the hub was asked)" if remote else ""
        raise ModelError(
            f"{config.where('name_or_path')}: no {what} could be loaded from {config.name_or_path!r}{hub}: "
            f"{' '.join(str(error).split())}"
        ) from error
