"""GaLore, by galore-torch, without DeepSpeed: every rank holds the whole model, and gradients are averaged by DDP.

Transformers has GaLore by names of ``optim``. Those leave ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` unused,
and layerwise ones resume with neither their moments nor their learning rate. So the same classes are built here.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from lisa_ds.config import RunConfig
from lisa_ds.errors import ConfigError
from lisa_ds.integrations import galore
from lisa_ds.methods.base import Method
from lisa_ds.models.linears import linears

_SECTION = "the section galore chooses the optimizer of method 'galore'"


class Galore(Method):
    """Every parameter trains; the gradients of linears are projected to a low rank before AdamW."""

    name = "galore"
    taken = dict.fromkeys(("optim", "optim_args", "optim_target_modules"), _SECTION)

    def check(self, config: RunConfig, model: Any) -> None:
        """See the base class: packages are missing, no linear is meant, or what upstream cannot do is asked for."""
        given, values = config.galore, config.training_values()
        if find_spec("galore_torch") is None:
            raise ConfigError(f"{config.where('method')}: 'galore' needs galore-torch; pip install 'lisa-ds[galore]'")
        if config.deepspeed is not None:
            raise ConfigError(
                f"{config.where('deepspeed')}: GaLore projects whole gradients, of which ZeRO gives a rank a slice; leave it out "
                "(deepspeed=null): every rank holds the whole model"
            )
        if values.fp16:
            raise ConfigError(
                f"{config.where('training.fp16')}: method 'galore' trains in bf16 or fp32; use training.bf16"
            )
        if given.master_weights and not values.bf16:
            raise ConfigError(
                f"{config.where('galore.master_weights')}: is for training.bf16: true; without it all is fp32 anyway"
            )
        if given.layerwise:
            _check_layerwise(config)
        shortest = min(min(module.weight.shape) for module in self._targets(config, model).values())
        if given.proj_type == "reverse_std" and given.rank >= shortest:
            raise ConfigError(
                f"{config.where('galore.rank')}: galore-torch computes proj_type 'reverse_std' for ranks below the shorter side of each "
                f"matrix, here {shortest}, got {given.rank}; choose a smaller rank, or 'std'"
            )

    def dtype(self, config: RunConfig) -> torch.dtype:
        """See the base class."""
        return torch.float32 if config.galore.master_weights else super().dtype(config)

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        """See the base class: no autocast over weights that are bf16 already, and no search for unused parameters unasked."""
        own: dict[str, Any] = {}
        if config.training.get("ddp_find_unused_parameters") is None:
            own["ddp_find_unused_parameters"] = False
        if not config.galore.master_weights:
            own["bf16"] = False
        if config.galore.layerwise:
            own["max_grad_norm"] = 0.0
        return own

    def prepare(self, trainer: Any, config: RunConfig) -> None:
        """See the base class."""
        given = config.galore
        galore.install(
            trainer,
            [module.weight for module in self._targets(config, trainer.model).values()],
            projection={
                "rank": given.rank,
                "update_proj_gap": given.update_proj_gap,
                "scale": given.scale,
                "proj_type": given.proj_type,
            },
            int8=given.moments == "int8",
            layerwise=given.layerwise,
        )

    def unreadable(self, config: RunConfig) -> str | None:
        """See the base class."""
        return "with galore.layerwise gradients are gone before they could be read" if config.galore.layerwise else None

    def _targets(self, config: RunConfig, model: Any) -> dict[str, Any]:
        return linears(config, model, inside=True, conv1d=False)


def _check_layerwise(config: RunConfig) -> None:
    where, training = config.where("galore.layerwise"), config.training
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            f"{where}: parameters are stepped before ranks have averaged their gradients, so it takes one rank, got "
            f"{os.environ['WORLD_SIZE']}; set it to false, or start one"
        )
    if config.training_values().gradient_accumulation_steps > 1:
        raise ConfigError(
            f"{where}: gradients are gone after each micro-batch, so it takes training.gradient_accumulation_steps: 1, got "
            f"{training['gradient_accumulation_steps']}"
        )
    if training.get("max_grad_norm"):
        raise ConfigError(
            f"{config.where('training.max_grad_norm')}: with galore.layerwise no norm of all gradients is known, got "
            f"{training['max_grad_norm']!r}; leave it out or set it to 0"
        )
