"""Backward passes outside training: gradients of chosen blocks go to a callback, and Stage 3 does not see them.

Note on what must not be touched.
    Stage 3's gradient hooks are on every parameter and call four methods of the optimizer by name: one that reduces,
    three that count hooks until the epilogue is due. During a side backward these names are shadowed. Stage 3's
    buffers, buckets and counters, and the engine's bookkeeping of forward and backward, are restored at the end, so
    that training goes on bit-exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from lisa_ds.engines.common.backward_start import CHECKPOINT, BackwardStart
from lisa_ds.engines.zero3.optimizer.window import WindowedStage3
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack

Arrived = Callable[[Any], None]
"""Called with each parameter whose whole gradient has come, in ``parameter.grad``; it must use and free it."""


@contextmanager
def side_backward(
    optimizer: WindowedStage3,
    module: nn.Module,
    stack: LayerStack,
    backward_start: BackwardStart,
    *,
    blocks: Collection[int],
    parameters: Collection[nn.Parameter],
    arrived: Arrived,
) -> Iterator[None]:
    """Inside, backward yields only the gradients of ``parameters``, each to ``arrived`` at once.

    Inside, every module is in eval mode, blocks that were set to be checkpointed are checkpointed all the same, and random numbers
    are drawn from a copy of the generators' state. Call it on every rank, after ``step()`` and before the next ``forward()``.

    Args:
        optimizer: The engine's.
        module: The partitioned model.
        stack: The same model, taken apart.
        backward_start: The engine's, which is moved to ``blocks`` and back.
        blocks: The blocks that ``parameters`` belong to.
        parameters: What requires grad inside; parameters that the optimizer holds.
        arrived: Takes the gradients.

    Raises:
        EngineError: A parameter has a gradient already.
    """
    if any(parameter.grad is not None for parameter in module.parameters()):
        raise EngineError("there are gradients that no step has used yet; score layers between step() and forward()")
    with ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        undo.enter_context(_same_random_numbers())
        undo.enter_context(_requiring_grad(module, parameters))
        undo.enter_context(_moved(backward_start, module, blocks, back=optimizer.sampled))
        undo.enter_context(_evaluating(module, stack))
        undo.enter_context(_diverted(optimizer, arrived))
        undo.enter_context(_own_trace(optimizer))
        undo.callback(_drop_gradients, parameters)
        yield


def release(optimizer: WindowedStage3) -> None:
    """Partition every parameter again, also in modules whose backward has not ended."""
    offload = optimizer.parameter_offload
    if hasattr(offload, "release_backward_leftovers"):  # DeepSpeed 0.19.5 has no list of such modules yet
        offload.release_backward_leftovers()
    optimizer._partition_all_parameters()


@contextmanager
def partitioned(optimizer: WindowedStage3) -> Iterator[None]:
    """Inside, no parameter is gathered, so that partitions may be written; persistent ones are gathered again."""
    release(optimizer)
    try:
        yield
    finally:
        if persistent := optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)


def _drop_gradients(parameters: Collection[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    device = get_accelerator()
    if device.device_name() == "cpu":
        devices, kind = [], "cuda"
    else:
        devices, kind = [device.current_device()], device.device_name()
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield


@contextmanager
def _requiring_grad(module: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    wanted = {id(parameter) for parameter in parameters}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _moved(
    backward_start: BackwardStart, module: nn.Module, blocks: Collection[int], back: Collection[int]
) -> Iterator[None]:
    # Transformers' own remedy for reentrant checkpointing, which the backward_start replaces by one that reaches less far down.
    marked: list[Any] = [
        each
        for each in module.modules()
        if getattr(each, "_require_grads_hooks", None) or hasattr(each, "_require_grads_hook")
    ]
    try:
        backward_start.move(blocks)
        backward_start.refresh()
        yield
    finally:
        backward_start.move(back)
        for model in marked:
            if not getattr(model, "_require_grads_hooks", None):
                model.enable_input_require_grads()


@contextmanager
def _evaluating(module: nn.Module, stack: LayerStack) -> Iterator[None]:
    """Inside, modules are in eval mode. Transformers checkpoints no block in eval mode: those switch later."""
    modes = [(each, each.training) for each in module.modules()]
    wrapped: list[tuple[Any, Any]] = []
    try:
        module.eval()
        for block in stack.layers:
            function = getattr(block, CHECKPOINT, None)
            if function is not None and getattr(block, "gradient_checkpointing", False):
                wrapped.append((block, function))
                setattr(block, CHECKPOINT, _evaluated_inside(block, function))
                block.training = True
        yield
    finally:
        for block, function in wrapped:
            setattr(block, CHECKPOINT, function)
        for each, mode in modes:
            each.training = mode


def _evaluated_inside(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(checkpoint)
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        @wraps(function)
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            block.training = False
            try:
                return function(*args, **kwargs)
            finally:
                block.training = True

        return checkpoint(evaluated, *args, **kwargs)

    return call


@contextmanager
def _diverted(optimizer: WindowedStage3, arrived: Arrived) -> Iterator[None]:
    """Shadow the methods that the gradient hooks call; each hook looks them up on the optimizer when it fires."""

    def reduce(parameter: Any) -> None:
        if getattr(parameter, "ds_grad_is_ready", True):  # a module computed in tiles adds up its gradient first
            arrived(parameter)

    shadows: dict[str, Callable[..., Any]] = {
        "reduce_ready_partitions_and_remove_grads": reduce,
        "should_refresh_expected_hook_count": lambda: False,
        "reenter_backward_if_needed": lambda: None,
        "update_hook_state_and_maybe_run_epilogue": lambda expected: None,
    }
    try:
        for name, shadow in shadows.items():
            setattr(optimizer, name, shadow)
        yield
    finally:
        for name in shadows:
            if name in optimizer.__dict__:
                delattr(optimizer, name)


@contextmanager
def _own_trace(optimizer: WindowedStage3) -> Iterator[None]:
    """Drop DeepSpeed's recorded order of fetches before and after: other modules run backward here than in training."""

    def forget() -> None:
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    forget()
    try:
        yield
    finally:
        forget()
        with partitioned(optimizer):
            pass
