"""The linears of a model that methods with low-rank updates work on."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lisa_ds.config import RunConfig
from lisa_ds.config.targets import Targets, chosen, name_nothing
from lisa_ds.layers import LayerStack


def linears(config: RunConfig, model: Any, *, inside: bool, conv1d: bool) -> dict[str, nn.Module]:
    """The linears that the ``targets`` of a run's method name, by path; the model's head is never one of them.

    Args:
        config: The run, of a method whose section has ``targets``.
        model: Its model, with or without weights.
        inside: See :func:`lisa_ds.config.targets.chosen`.
        conv1d: Whether transformers' ``Conv1D`` counts as a linear.

    Raises:
        ConfigError: They name none.
    """
    there = all_linears(model, config.lisa.layers_path, conv1d=conv1d)
    targets: Targets = getattr(config, config.method).targets
    found = {path: module for path, module in there.items() if chosen(targets, path, inside=inside)}
    if not found:
        raise name_nothing(config.where(f"{config.method}.targets"), config.model.name_or_path, targets, there)
    return found


def all_linears(model: Any, layers_path: str = "auto", *, conv1d: bool) -> dict[str, nn.Module]:
    """All linears but the head's, by path; arguments as of :func:`linears`."""
    stack = LayerStack.from_model(model, layers_path)
    kinds = (nn.Linear, Conv1D) if conv1d else (nn.Linear,)
    outside = {id(parameter) for parameter in (*stack.lm_head, *stack.embeddings)}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, kinds) and id(module.weight) not in outside
    }
