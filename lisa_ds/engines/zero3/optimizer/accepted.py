"""Whose update the fused step may take the place of: AdamW's."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lisa_ds.errors import EngineError
from lisa_ds.optim import MaskedAdamW, StateFormat


def check_optimizer(optimizer: Any, state_format: StateFormat) -> None:
    """Refuse an optimizer whose update is not AdamW's.

    Raises:
        EngineError: Names it and the remedy.
    """
    kind = type(optimizer).__name__
    reason = _not_adamw(optimizer, kind)
    if reason is None and isinstance(optimizer, MaskedAdamW) and optimizer.format != state_format:
        reason = f"has {optimizer.format}, but lisa.optimizer says {state_format}; set both alike"
    if reason is not None:
        raise EngineError(
            f"optimizer: {kind} {reason}. lisa.optimizer 'masked_adamw' computes AdamW; give torch.optim.AdamW, or set "
            "lisa.optimizer to 'adamw' to keep the optimizer that was given"
        )


def _not_adamw(optimizer: Any, kind: str) -> str | None:
    groups = optimizer.param_groups
    if any(group.get("amsgrad") or group.get("maximize") for group in groups):
        return "is set to amsgrad or maximize"
    if isinstance(optimizer, MaskedAdamW):
        if optimizer.max_grad_norm is not None:
            return "clips to max_grad_norm, which under the engine is gradient_clipping of DeepSpeed's config"
        return None
    if isinstance(optimizer, torch.optim.Adam):
        if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(torch.optim.Adam.step):
            return "has a step of its own"
        if isinstance(optimizer, torch.optim.AdamW):
            return None
    decoupled = isinstance(optimizer, torch.optim.Adam) and all(g.get("decoupled_weight_decay") for g in groups)
    adam = isinstance(optimizer, torch.optim.Adam) or kind in ("FusedAdam", "DeepSpeedCPUAdam")
    if not adam:
        return "is not AdamW"
    if not all(group.get("bias_correction", True) for group in groups):
        return "is set to no bias correction"
    if decoupled or getattr(optimizer, "adam_w_mode", False) or not any(group["weight_decay"] for group in groups):
        return None
    return "adds its weight decay to the gradient"
