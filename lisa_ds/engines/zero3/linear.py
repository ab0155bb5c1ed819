"""A ZeRO-3 linear that forgets its input when its weight is frozen.

DeepSpeed replaces ``torch.nn.functional.linear`` so that backward can gather the weight again instead of keeping it. Its
replacement always saves the input, which only the weight's gradient needs: under LISA nearly every linear is frozen, and
those inputs are most of the activation memory that freezing should have freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap
from torch import Tensor


class FrozenAwareLinear(LinearFunctionForZeroStage3):
    """DeepSpeed's linear, saving ``input`` for backward only where the weight's gradient is wanted."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what backward will read; see ``LinearFunctionForZeroStage3.setup_context``."""
        LinearFunctionForZeroStage3.setup_context(ctx, inputs, output)
        if not ctx.needs_input_grad[1]:
            # save_for_backward keeps the last call's tensors; backward reads `input` for grad_weight alone.
            ctx.save_for_backward(None, inputs[1], inputs[2] if len(inputs) > 2 else None)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = FrozenAwareLinear.apply(input, weight, bias)
    return result


@contextmanager
def frozen_aware_linear() -> Iterator[None]:
    """Use :class:`FrozenAwareLinear` in place of DeepSpeed's own, inside the ``with`` only.

    Scoped, so that other engines of the process keep the stock function. Does nothing where DeepSpeed has not replaced
    ``linear`` (``memory_efficient_linear: false``).
    """
    if torch.nn.functional.linear is not zero3_linear_wrap:
        yield
        return
    torch.nn.functional.linear = _linear
    try:
        yield
    finally:
        torch.nn.functional.linear = zero3_linear_wrap
