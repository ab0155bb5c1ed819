"""Merges the adapters of a PEFT model for a while, and gives the base weights back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lisa_ds.checkpoint.adapters import adapted_layers
from lisa_ds.errors import CheckpointError


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Inside the ``with``, the active adapters are merged into the weights, so that generation and evaluation are those of a plain model.

    Afterwards, also after an exception, each base weight has the bits that it had before: they are kept on the CPU, since subtracting
    what was added would not give them back. Do not train inside.

    Args:
        model: A PEFT model whose weights are whole on this process.

    Yields:
        ``model``.

    Raises:
        CheckpointError: It has no adapter, is merged already, is partitioned or quantised, or an adapted weight is tied to another.

    Example:
        >>> with merged(model):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    layers = adapted_layers(model)
    if not layers:
        raise CheckpointError(f"merged(model): {type(model).__name__} has no adapter; give a PEFT model")
    weights = {}
    for name, layer in layers.items():
        for key, weight in layer.get_base_layer().named_parameters():
            weights[f"{name}.{key}"] = weight
    _check(model, layers, weights)
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    try:
        for layer in layers.values():
            layer.merge()
        yield model
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unmerge that is not exact
            for name, layer in layers.items():
                if layer.merged:
                    layer.unmerge()  # for PEFT's notes of what is merged; the weights follow
                _restore(layer, name, kept)


def _check(model: Any, layers: dict[str, Any], weights: dict[str, Tensor]) -> None:
    if merged_already := [name for name, layer in layers.items() if layer.merged]:
        raise CheckpointError(
            f"merged(model): {merged_already[0]} is merged already; call model.unmerge_adapter() before, or leave this out"
        )
    for name, weight in weights.items():
        if hasattr(weight, "ds_id") or hasattr(weight, "placements"):  # DeepSpeed's; DTensor's
            raise CheckpointError(
                f"merged(model): {name} is partitioned over ranks (ZeRO-3, FSDP or tensor parallelism), and can only be merged as a "
                "whole: export the adapter (lisa-ds export) and merge it in files (lisa-ds merge)"
            )
        if not weight.is_floating_point() or weight.is_meta:
            raise CheckpointError(
                f"merged(model): {name} is {'on the meta device' if weight.is_meta else 'quantised'}, so nothing can be added to it"
            )
    if tied := _tied_to_others(model, weights.values()):
        raise CheckpointError(
            f"merged(model): {' and '.join(tied)} are one tied weight, so merging the adapter of one would change both; merge in "
            "files (lisa-ds merge), which parts them"
        )


def _tied_to_others(model: Any, weights: Iterable[Tensor]) -> list[str]:
    """The names of one of the weights that another module has as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return next((names[id(weight)] for weight in weights if len(names[id(weight)]) > 1), [])


def _restore(layer: Any, name: str, kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, weight in layer.get_base_layer().named_parameters():
            weight.copy_(kept[f"{name}.{key}"])
