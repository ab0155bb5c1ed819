"""The longest row that a model can read, and the longest that it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def most_positions(model: Any) -> int | None:
    """The size of the model's table of positions, beyond which it raises an error; None if it has no such table.

    Tables are learned (GPT-2, OPT, BERT), computed once and looked up (GPT-J, CodeGen, CTRL), or biases of a fixed length (MPT).
    Rotary embeddings that are computed when needed, relative positions and ALiBi have no such limit.

    Args:
        model: The model, with or without weights.
    """
    tokens = model.get_input_embeddings()
    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens and _of_positions(name):
            # Some keep the first rows for padding.
            kept = module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0))
            limits.append(module.num_embeddings - kept)
        for table in ("embed_positions", "pos_encoding"):
            found = module.__dict__.get(table, module._buffers.get(table))
            if isinstance(found, Tensor) and found.dim() == 2:
                limits.append(len(found))
    if getattr(model.config, "model_type", "") == "mpt":
        limits.append(model.config.max_seq_len)
    return min(limits, default=None)


def _of_positions(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return ("pos" in leaf or leaf == "wpe") and "rel" not in leaf


def trained_positions(config: Any) -> int | None:
    """The longest rows that a model with rotary embeddings was trained for, scaling included; None if unknown.

    Args:
        config: The model's transformers config.
    """
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for each in (scaling, *(scaling.values() if isinstance(scaling, Mapping) else ())):  # or one for each kind of layer
        factor = each.get("factor") if isinstance(each, Mapping) else None
        if isinstance(factor, (int, float)) and factor > 1:
            longest = max(longest, int(factor * (each.get("original_max_position_embeddings") or longest)))
    return longest
