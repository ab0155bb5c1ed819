"""Which optimizers the fused step may replace: AdamW alone."""

from __future__ import annotations

from typing import Any

from lisa_ds.engines.common.adam import not_adamw
from lisa_ds.errors import EngineError
from lisa_ds.optim import MaskedAdamW, StateFormat


def check_optimizer(optimizer: Any, state_format: StateFormat) -> None:
    """Refuse an optimizer whose update is not AdamW's.

    Raises:
        EngineError: Names it and the remedy.
    """
    reason = not_adamw(optimizer)
    if reason is None and isinstance(optimizer, MaskedAdamW):
        if optimizer.max_grad_norm is not None:
            reason = "clips to max_grad_norm, which under the engine is gradient_clipping of DeepSpeed's config"
        elif optimizer.format != state_format:
            reason = f"has {optimizer.format}, but lisa.optimizer says {state_format}; set both alike"
    if reason is not None:
        raise EngineError(
            f"optimizer: {type(optimizer).__name__} {reason}. lisa.optimizer 'masked_adamw' computes AdamW; give torch.optim.AdamW, or set "
            "lisa.optimizer to 'adamw' to keep the optimizer that was given"
        )
