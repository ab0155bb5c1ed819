"""A ZeRO-3 linear that does not save its input for backward when its weight is frozen.

DeepSpeed replaces ``torch.nn.functional.linear`` so that backward can gather the weight again instead of keeping it. Its
replacement always saves the input, which only the weight's gradient needs: under LISA nearly every linear is frozen, and
those inputs are most of the activation memory that freezing should have freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap
from torch import Tensor, nn

_OWNED = "_lisa_forgets_input"
_installed = 0  # engines of this process that use it


class FrozenAwareLinear(LinearFunctionForZeroStage3):
    """DeepSpeed's linear, which saves ``input`` for backward only if the weight needs a gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what backward needs; see ``LinearFunctionForZeroStage3.setup_context``."""
        LinearFunctionForZeroStage3.setup_context(ctx, inputs, output)
        if not ctx.needs_input_grad[1]:
            # save_for_backward keeps the last call's tensors; backward reads `input` for grad_weight alone.
            ctx.save_for_backward(None, inputs[1], inputs[2] if len(inputs) > 2 else None)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if hasattr(weight, _OWNED):
        result: Tensor = FrozenAwareLinear.apply(input, weight, bias)
        return result
    return zero3_linear_wrap(input, weight, bias)


def install(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Have every linear with one of ``parameters`` as its weight save no input while the weight is frozen.

    Weights of other models keep DeepSpeed's function. The choice belongs to the weight and not to a ``with`` around forward,
    because non-reentrant checkpointing must save the same tensors when it recomputes, whoever calls backward.

    Returns:
        A function that undoes it. Nothing is done where DeepSpeed has not replaced ``linear``
        (``memory_efficient_linear: false``).
    """
    global _installed
    if torch.nn.functional.linear not in (zero3_linear_wrap, _linear):
        return lambda: None
    owned = list(parameters)
    for parameter in owned:
        setattr(parameter, _OWNED, True)
    torch.nn.functional.linear = _linear
    _installed += 1

    def uninstall() -> None:
        global _installed
        if not owned:
            return
        for parameter in owned:
            if hasattr(parameter, _OWNED):
                delattr(parameter, _OWNED)
        owned.clear()
        _installed -= 1
        if not _installed and torch.nn.functional.linear is _linear:
            torch.nn.functional.linear = zero3_linear_wrap

    return uninstall
