"""Recognises Adam and AdamW: before an optimizer is replaced, and to compute an update's norm from its moments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from lisa_ds.optim import MaskedAdamW

_DEEPSPEED_ADAMS = ("FusedAdam", "DeepSpeedCPUAdam")  # by name: an engine need not have DeepSpeed


def is_adam(optimizer: Any) -> bool:
    """Whether the update of ``optimizer`` follows from its moments as Adam's or AdamW's; subclasses may differ."""
    if isinstance(optimizer, torch.optim.Adam):
        return inspect.unwrap(type(optimizer).step) is inspect.unwrap(torch.optim.Adam.step)
    return isinstance(optimizer, MaskedAdamW) or type(optimizer).__name__ in _DEEPSPEED_ADAMS


def decouples(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Whether an Adam applies the weight decay of ``group`` to the weights (decoupled), not to the gradient."""
    return (
        isinstance(optimizer, (torch.optim.AdamW, MaskedAdamW))
        or bool(group.get("decoupled_weight_decay"))
        or bool(getattr(optimizer, "adam_w_mode", False))
    )


def not_adamw(optimizer: Any) -> str | None:
    """Why the update of ``optimizer`` is not AdamW's, as text that follows its name; None if it is."""
    groups = optimizer.param_groups
    if any(group.get("amsgrad") or group.get("maximize") for group in groups):
        return "is set to amsgrad or maximize"
    if not is_adam(optimizer):
        return "has a step of its own" if isinstance(optimizer, torch.optim.Adam) else "is not AdamW"
    if not all(group.get("bias_correction", True) for group in groups):
        return "is set to no bias correction"
    if all(decouples(optimizer, group) or not group["weight_decay"] for group in groups):
        return None
    return "adds its weight decay to the gradient"
