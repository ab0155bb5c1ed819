"""PEFT models in trainers: effective weights (base weights plus adapters' deltas), and saving adapters alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn


class Adapters:
    """The adapters of a model; without PEFT it has none, and every parameter is a plain weight.

    Args:
        model: Partitioned by ZeRO-3 or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Told by what they have, so that PEFT need not be installed: a layer that wraps another and knows its delta.
        self._layers: list[Any] = [
            module for module in model.modules() if hasattr(module, "base_layer") and hasattr(module, "get_base_layer")
        ]
        self._copies: list[Any] = [
            module
            for module in model.modules()
            if hasattr(module, "original_module") and hasattr(module, "modules_to_save")
        ]

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._layers or self._copies)

    def plain_weights(self) -> list[nn.Parameter]:
        """The parameters that are weights by themselves: neither adapters' nor what adapters add to or replace."""
        apart: set[int] = set()
        for layer in self._layers:
            base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
            apart.update(id(parameter) for parameter in layer.parameters() if id(parameter) not in base)
            if _active(layer):
                apart.add(id(_weight(layer)))
        for copy in self._copies:
            used = _used(copy)
            kept = {id(parameter) for parameter in used.parameters()}
            apart.update(id(parameter) for parameter in copy.parameters() if id(parameter) not in kept)
        return [parameter for parameter in self._model.parameters() if id(parameter) not in apart]

    @torch.no_grad()
    def effective_squares(self) -> Iterator[tuple[nn.Parameter, float | None]]:
        """Squared 2-norm of each weight with its adapters' deltas added, by the weight; None where PEFT gives no delta.

        One module at a time is gathered from its partitions, so under ZeRO-3 every rank must take all.
        """
        for layer in self._layers:
            names = _active(layer)
            if not names:
                continue
            weight = _weight(layer)
            if any(_is_no_sum(layer, name) for name in names):
                yield weight, None
                continue
            parameters = list(layer.parameters())
            with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(weight, "ds_id")):
                whole = weight.detach().float()
                for name in names:
                    whole = whole + layer.get_delta_weight(name).to(whole)
                square = whole.norm(dtype=torch.float64).square().item()
            yield weight, square


def save_alone(trainer: Any) -> None:
    """Have ``trainer.save_model`` write the adapters of its PEFT model, and not gather the weights beside them.

    Args:
        trainer: A ``transformers.Trainer``, under ZeRO-3, ZeRO-2 or no DeepSpeed.
    """

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        place = Path(output_dir or trainer.args.output_dir)
        state = trained_weights(trainer.model)
        if not trainer.args.should_save:
            return
        os.makedirs(place, exist_ok=True)
        # "auto" would ask the hub for the base model's vocabulary.
        trainer.model.save_pretrained(str(place), state_dict=state, save_embedding_layers=False)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(str(place))

    trainer.save_model = save_model


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that train, by name, on the CPU; every rank takes part, one parameter at a time."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                state[name] = parameter.detach().cpu().clone()
    return state


def _weight(layer: Any) -> nn.Parameter:
    """The weight that the delta is added to; in a layer that PEFT treats otherwise, its first parameter."""
    base: Any = layer.get_base_layer()
    weight: nn.Parameter = base.weight if hasattr(base, "weight") else next(base.parameters())
    return weight


def _active(layer: Any) -> list[str]:
    """The adapters that are added to the layer's weight at each forward."""
    if layer.disable_adapters:
        return []
    known = {name for group in layer.adapter_layer_names for name in getattr(layer, group, {})}
    return [name for name in layer.active_adapters if name in known and name not in layer.merged_adapters]


def _is_no_sum(layer: Any, name: str) -> bool:
    # DoRA and its like scale the sum as well; a quantised weight is not a number yet.
    base = layer.get_base_layer()
    if not hasattr(base, "weight") or not base.weight.is_floating_point():
        return True
    return name in getattr(layer, "lora_variant", {}) or not hasattr(layer, "get_delta_weight")


def _used(copy: Any) -> nn.Module:
    names = [] if copy.disable_adapters else [name for name in copy.active_adapters if name in copy.modules_to_save]
    used: nn.Module = copy.modules_to_save[names[0]] if names else copy.original_module
    return used
