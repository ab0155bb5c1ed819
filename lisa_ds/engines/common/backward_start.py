"""Cut-off of backward: with the embeddings frozen, nothing below the lowest sampled block needs a gradient.

Autograd stops there by itself, except under reentrant activation checkpointing: a checkpointed block whose inputs need
no gradient yields an output that needs none, and the sampled block's weights would silently not train. The usual remedy
(make the embeddings' output require grad, as transformers does wherever checkpointing is turned on, reentrant or not)
extends backward, and the recomputation, down to the first block. Here that is undone: only the input of the lowest
sampled block of each stack requires grad, and which block that is changes at each switch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

import torch

from lisa_ds.layers import LayerStack

CHECKPOINT = "_gradient_checkpointing_func"  # transformers.GradientCheckpointingLayer calls it with the block's inputs


class BackwardStart:
    """Keeps the inputs of the lowest sampled block of each stack differentiable under reentrant checkpointing."""

    def __init__(self, model: torch.nn.Module, stack: LayerStack) -> None:
        self._stack = stack
        self._models: list[Any] = [
            module for module in model.modules() if hasattr(module, "disable_input_require_grads")
        ]
        self._lowest: list[torch.nn.Module] = []
        self._wrapped: dict[torch.nn.Module, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # original, ours

    def move(self, sampled: Collection[int]) -> None:
        """Set the cut-off at the lowest blocks of what is ``sampled``, in place of the former ones."""
        blocks = {self._stack.units[unit].block for unit in sampled}
        for block, (original, ours) in self._wrapped.items():
            if getattr(block, CHECKPOINT) is ours:
                setattr(block, CHECKPOINT, original)
        self._wrapped.clear()
        lowest = (min((i for i in stack if i in blocks), default=None) for stack in self._stack.stacks)
        self._lowest = [self._stack.layers[i] for i in lowest if i is not None]

    def refresh(self) -> None:
        """Wrap the checkpoint function of the lowest blocks, also if checkpointing was turned on meanwhile."""
        for model in self._models:
            if getattr(model, "_require_grads_hooks", None) or hasattr(model, "_require_grads_hook"):
                model.disable_input_require_grads()
        for block in self._lowest:
            function = getattr(block, CHECKPOINT, None)
            if function is not None and function is not self._wrapped.get(block, (None, None))[1]:
                self._wrapped[block] = (function, _with_input_grad(function))
                setattr(block, CHECKPOINT, self._wrapped[block][1])


def _with_input_grad(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(checkpoint)
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *_require_grad(args), **kwargs)

    return call


def _require_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the first floating-point tensor of ``args`` (the hidden states) a leaf that requires grad."""
    if not torch.is_grad_enabled():
        return args
    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if not value.requires_grad:
                args = (*args[:position], value.detach().requires_grad_(), *args[position + 1 :])
            break
    return args
