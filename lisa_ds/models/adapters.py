"""Adapters beside the weights that LISA trains, put into a model by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from lisa_ds.config import LisaConfig
from lisa_ds.config.targets import chosen, name_nothing
from lisa_ds.errors import ConfigError
from lisa_ds.models.linears import all_linears


def add_adapters(model: Any, lisa_config: LisaConfig | Mapping[str, Any] | str | Path | None, *, seed: int = 0) -> Any:
    """Put the adapters of ``lisa.adapters`` beside the linears of ``model``, in place; call it before optimizer and engine are built.

    Args:
        model: A model of transformers with its weights, partitioned by ZeRO-3 or not. What requires grad still does afterwards.
        lisa_config: The LISA section: a config, its keys, or a file.
        seed: Of the adapters' first values; equal on all ranks.

    Returns:
        ``model``, of its own class: exports have plain weights, with the adapters added.

    Raises:
        ConfigError: PEFT is missing, the section has no ``adapters``, they name no linear, or ``model`` has them already.

    Example::

        model = lisa_ds.add_adapters(model, {"unit": "matrix", "adapters": {"rank": 8}})
        engine, optimizer, _, _ = lisa_ds.initialize(model=model, optimizer=optimizer, config=ds, lisa_config=lisa)
    """
    config = LisaConfig.load(lisa_config)
    given = config.adapters
    if given is None:
        raise ConfigError(
            f"{config.where('adapters')}: should be a section with a rank, got nothing; there is none to add"
        )
    if find_spec("peft") is None:
        raise ConfigError(f"{config.where('adapters')}: needs PEFT; pip install 'lisa-ds[peft]'")
    if hasattr(model, "lisa_adapters"):
        raise ConfigError(f"{config.where('adapters')}: {type(model).__name__} has them already; add them once")
    from peft import LoraConfig, inject_adapter_in_model

    found = _linears(model, config)
    transposed = any(isinstance(module, Conv1D) for module in found.values())
    settings = LoraConfig(
        r=given.rank, lora_alpha=given.scale_numerator, target_modules=list(found), fan_in_fan_out=transposed
    )
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = next(iter(found.values())).weight.dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:  # PEFT makes them fp32 beside 16-bit weights
            parameter.data = parameter.data.to(dtype)
    for parameter in trains:
        parameter.requires_grad_(True)
    model.lisa_adapters = {"scaling": given.scale_numerator / given.rank, "transposed": transposed}
    return model


def numels(model: Any, config: LisaConfig) -> list[int]:
    """Elements of each matrix of the adapters that :func:`add_adapters` would put into ``model``.

    Raises:
        ConfigError: They name no linear.
    """
    given = config.adapters
    if given is None:
        return []
    found = []
    for module in _linears(model, config).values():
        out, into = getattr(module.weight, "ds_shape", module.weight.shape)
        found += [given.rank * into, given.rank * out]
    return found


def _linears(model: Any, config: LisaConfig) -> dict[str, Any]:
    given = config.adapters
    assert given is not None
    there = all_linears(model, config.layers_path, conv1d=True)
    found: dict[str, Any] = {
        path: module for path, module in there.items() if chosen(given.targets, path, inside=False)
    }
    if not found:
        raise name_nothing(config.where("adapters.targets"), type(model).__name__, given.targets, there)
    return found
