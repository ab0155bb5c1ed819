"""Whether a checkpoint can be trained for a task, from its config and the headers of its files; reads no weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from lisa_ds.config import ModelConfig
from lisa_ds.errors import ModelError
from lisa_ds.models.stored import stored_tensors

_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
_CLASSIFYING = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
_SEQ2SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
_WITH_IMAGES = getattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {})

_PICKLED = (b"PK", b"\x80")  # a zip of torch's, or a bare pickle


def check_task(config: ModelConfig, shape: Any) -> None:
    """Refuse an architecture that transformers would train for another purpose than ``config.task``, or cannot at all.

    Args:
        config: The model section.
        shape: The model's transformers config.

    Raises:
        ModelError: Names the key, what the model is, and what to name instead.
    """
    kind = getattr(shape, "model_type", "")
    where = f"{config.where('name_or_path')}: {config.name_or_path!r} is"
    remote = getattr(shape, "auto_map", None) or {}
    if config.task == "sequence_classification":
        if kind not in _CLASSIFYING and "AutoModelForSequenceClassification" not in remote:
            raise ModelError(
                f"{where} a {kind!r} model, for which transformers has no classification head{_other(shape)}"
            )
        return
    if getattr(shape, "is_encoder_decoder", False) or kind in _SEQ2SEQ:
        raise ModelError(
            f"{where} an encoder and a decoder ({kind}), and task 'causal_lm' would train its decoder without what it reads from "
            "the encoder; name a decoder-only model"
        )
    if "AutoModelForCausalLM" in remote:
        return
    if kind not in _CAUSAL:
        raise ModelError(
            f"{where} a {kind!r} model, for which transformers has no causal language model{_other(shape)}"
        )
    if kind in _MASKED and not (getattr(shape, "is_decoder", False) or getattr(shape, "causal", False)):
        raise ModelError(
            f"{where} a {kind!r} model for masked language modelling: each of its tokens sees those that it is to predict; name a "
            'decoder-only model, or set "is_decoder": true in its config.json'
        )


def _other(shape: Any) -> str:
    if getattr(shape, "model_type", "") in _WITH_IMAGES or hasattr(shape, "vision_config"):
        return "; it reads images beside text: name its language model alone"
    return "; name a decoder-only language model"


def check_files(config: ModelConfig, path: str) -> None:
    """Refuse a directory whose weights are missing or truncated, as far as that shows without reading them.

    Raises:
        ModelError: Names the file.
    """
    if not os.path.isdir(path):
        return  # of the hub
    where = config.where("name_or_path")
    for file in weight_files(Path(path), where):
        if file.suffix == ".safetensors":
            stored_tensors(file)
        else:
            with file.open("rb") as opened:
                if not opened.read(2).startswith(_PICKLED):
                    raise ModelError(
                        f"{where}: {file} holds no weights as torch writes them; copy or download it again"
                    )


def weight_files(place: Path, where: str) -> list[Path]:
    """The files of a directory that hold its model's weights.

    Args:
        place: The directory.
        where: Begins the error message.

    Raises:
        ModelError: There are none, the index is damaged, or a file that it names is missing.
    """
    indices = [place / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")]
    wholes = [place / name for name in ("model.safetensors", "pytorch_model.bin")]
    files = [file for file in wholes[:1] if file.is_file()]
    if not files:
        index = next((file for file in indices if file.is_file()), None)
        files = _shards(index, where) if index else [file for file in wholes if file.is_file()]
    if not files:
        raise ModelError(
            f"{where}: {place} holds a config.json and no weights; it lacks model.safetensors, or its index and shards"
        )
    for file in files:
        if not file.is_file():
            raise ModelError(f"{where}: {file} is missing, which the index of {place} names; copy or download it again")
    return files


def _shards(index: Path, where: str) -> list[Path]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in dict.fromkeys(named)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{where}: {index} is damaged: it has no weight_map; copy or download it again") from None
