"""Scores all blocks from gradients on calibration data, without holding the gradients of all blocks at once.

Note on what is kept.
    A gradient is used as soon as backward yields it, and freed before the next one comes: only numbers remain of it, or
    its part in a sum that is partitioned over the ranks. Where sums must be held, the blocks are scored a few at a
    time, in several passes over the calibration data. :func:`lisa_ds.memory.probe_bytes` says what that takes.
    Gradients are those of the weights as they are trained, in their dtype; the loss is not scaled, so fp16 gradients
    may vanish.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from lisa_ds.engines.common import scores
from lisa_ds.engines.common.backward_start import BackwardStart
from lisa_ds.engines.common.rademacher import key_of, mover
from lisa_ds.engines.zero3.optimizer.window import WindowedStage3
from lisa_ds.engines.zero3.partition import fill
from lisa_ds.engines.zero3.scoring.collectors import Collector, Norms, Slopes, Squares, Sums
from lisa_ds.engines.zero3.scoring.side_backward import partitioned, release, side_backward
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack

logger = logging.getLogger("lisa_ds.scores")  # a pass may take long: launch/train.py shows its lines

Calibration = Callable[[nn.Module], Iterable[Tensor]]
"""A generator function: given the partitioned model, yields one loss ``()`` for each batch of this rank's calibration
data.

It is called once a pass, must start again with the same data each time, and must run forward for a batch only when its
loss is requested. Every rank yields the same number of losses.
"""


class Probe:
    """Scores every block of a model under ZeRO-3, between two optimizer steps.

    Only parameters that train when their block is sampled count. The optimizer's state, its gradients, the weights, the modules'
    modes and the generators of random numbers are afterwards what they were, to the bit.

    Args:
        optimizer: The engine's.
        module: The partitioned model.
        stack: The same model, taken apart.
        backward_start: The engine's.
        calibration: See :data:`Calibration`.
        probe_blocks: Blocks scored at a time by ``accumulated`` and ``hutchinson``.
        seed: Seed of the Rademacher vectors of ``hutchinson``.
        epsilon: How far ``hutchinson`` moves each weight; by default 1e-4 in fp32, 3e-3 in bf16, 1e-3 in fp16.

    Raises:
        EngineError: Ranks share layers or sequences.
    """

    def __init__(
        self,
        optimizer: WindowedStage3,
        module: nn.Module,
        stack: LayerStack,
        backward_start: BackwardStart,
        calibration: Calibration,
        *,
        probe_blocks: int = 1,
        seed: int = 0,
        epsilon: float | None = None,
    ) -> None:
        check(optimizer)
        self._optimizer, self._module, self._stack, self._backward_start = optimizer, module, stack, backward_start
        self._calibration = calibration
        self._probe_blocks = max(1, min(probe_blocks, len(stack.layers)))
        owned = optimizer.owned()
        self._parameters: list[list[Any]] = [
            [parameter for parameter in block.parameters() if id(parameter) in owned] for block in stack.layers
        ]
        self._key_of = {
            id(parameter): key_of(seed, number) for number, parameter in enumerate(module.parameters())
        }  # by place in the model: the same on any number of ranks
        self._epsilon = epsilon
        self._batches: int | None = None
        self._device = torch.device(get_accelerator().current_device_name())
        self._group = optimizer.dp_process_group

    def scores(self, kind: str) -> list[float]:
        """The score of every block, the same on every rank to the bit.

        Args:
            kind: ``accumulated``: the gradient is summed over all batches, and averaged over ranks; a block's score is the
                sum over its parameters of that gradient's 2-norm. One pass over the data for each ``probe_blocks`` blocks.
                ``mean``: the mean over batches of the 2-norm of the block's gradient, averaged over ranks. One pass.
                ``empirical``: the trace of the block's empirical Fisher information: the mean over all losses of all ranks of
                the squared 2-norm of the block's gradient. It is exact where a loss is that of one row. One pass.
                ``hutchinson``: an estimate of the trace of the block's part of the Hessian of the mean loss, ``v^T H v`` for
                one Rademacher vector ``v``. ``H v`` is the central difference of gradients at weights moved by
                ``+-epsilon * v``. It may be negative. Two passes for each ``probe_blocks`` blocks. Blocks moved at the
                same time add their cross terms, whose mean is zero; ``probe_blocks: 1`` has none. In fp32 the
                difference is good to three digits or more; weights and gradients in 16 bits leave one digit, or less.

        Raises:
            EngineError: The ranks yield different numbers of losses, a loss depends on no block, or a score is not finite.
        """
        collectors: dict[str, type[Collector]] = {"accumulated": Sums, "mean": Norms, "empirical": Squares}
        found: list[float] = []
        windows = scores.passes(len(self._stack.layers), kind, self._probe_blocks)
        for number, blocks in enumerate(windows, start=1):
            label = f"pass {number} of {len(windows)}"
            if kind == "hutchinson":
                found += self._curvature(label, blocks)
            else:
                found += self._pass(kind, label, blocks, collectors[kind])
        return self._agreed(found, kind)

    # ---- one pass over the data -----------------------------------------------------------------------------------

    def _pass(self, kind: str, label: str, blocks: Sequence[int], collector: type[Collector]) -> list[float]:
        """One pass over the calibration data with the gradients of ``blocks``; a number for each of them."""
        start = time.monotonic()
        parameters = [self._parameters[block] for block in blocks]
        collected = collector(parameters, self._group, self._device, self._key_of)
        name_of = self._stack.names
        arrived: set[int] = set()
        in_this_batch: set[int] = set()

        def arrive(parameter: Any) -> None:
            if id(parameter) in in_this_batch and not collector.additive:
                raise EngineError(
                    f"the gradient of {name_of[id(parameter)]} comes in parts, because reentrant checkpointing runs the parts of a "
                    f"block backward on their own; score by 'accumulated', or checkpoint with use_reentrant=False"
                )
            in_this_batch.add(id(parameter))
            collected.take(parameter)

        every = list(itertools.chain.from_iterable(parameters))
        batches = 0
        with (
            side_backward(
                self._optimizer,
                self._module,
                self._stack,
                self._backward_start,
                blocks=blocks,
                parameters=every,
                arrived=arrive,
            ),
            _in_step(self._module, self._group, self._device) as meet,
        ):
            for loss in self._calibration(self._module):
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                del loss
                release(self._optimizer)
                arrived |= in_this_batch
                in_this_batch.clear()
                collected.batch_done()
                batches += 1
            meet(False)
        self._check(blocks, batches, arrived)
        result = collected.result(batches)
        if dist.get_rank() == 0:
            which = f"layers {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"layer {blocks[0]}"
            logger.info(
                "scores (%s): %s, %s, %d batches, %.1f s", kind, label, which, batches, time.monotonic() - start
            )
        return result

    def _check(self, blocks: Sequence[int], batches: int, arrived: set[int]) -> None:
        if batches == 0:
            raise EngineError("calibration yielded no loss: it must yield one for each batch, anew at each call")
        if self._batches not in (None, batches):
            raise EngineError(
                f"calibration yielded {batches} losses in this pass, but {self._batches} in the one before; it must go through the "
                "same data at each call: give it a data loader, not an iterator that is used up"
            )
        self._batches = batches
        cut_off = [
            block
            for block in blocks
            if self._parameters[block] and not any(id(parameter) in arrived for parameter in self._parameters[block])
        ]
        if cut_off:
            raise EngineError(
                f"layers {cut_off} got no gradient from any calibration batch: the loss does not depend on them, or reentrant "
                "checkpointing that is not transformers' own cuts them off; use torch.utils.checkpoint with "
                "use_reentrant=False there, or yield the loss itself, not a detached copy"
            )

    def _agreed(self, found: list[float], kind: str) -> list[float]:
        agreed = torch.tensor(found, dtype=torch.float64, device=self._device)
        dist.broadcast(agreed, 0)
        result: list[float] = agreed.tolist()
        scores.check_finite(result, kind)
        return result

    # ---- curvature ------------------------------------------------------------------------------------------------

    def _curvature(self, label: str, blocks: Sequence[int]) -> list[float]:
        parameters = [parameter for block in blocks for parameter in self._parameters[block]]
        epsilon = self._epsilon or scores.EPSILON[parameters[0].ds_tensor.dtype if parameters else torch.float32]
        slopes = []
        with self._saved(parameters) as saved:
            for sign in (1, -1):
                with partitioned(self._optimizer), torch.no_grad():
                    for parameter, weights in zip(parameters, saved, strict=True):
                        parameter.ds_secondary_tensor = None
                        parameter.ds_tensor.copy_(weights)
                        fill(parameter, mover(sign * epsilon, self._key_of[id(parameter)]))
                side = "above" if sign > 0 else "below"
                slopes.append(self._pass("hutchinson", f"{label}, {side}", blocks, Slopes))
        above, below = slopes
        return scores.curvatures(above, below, epsilon)

    @contextmanager
    def _saved(self, parameters: Sequence[Any]) -> Iterator[list[Tensor]]:
        """Restore the partitions of ``parameters`` at the end, whatever happens inside."""
        saved = [parameter.ds_tensor.clone() for parameter in parameters]
        try:
            yield saved
        finally:
            with partitioned(self._optimizer), torch.no_grad():
                for parameter, weights in zip(parameters, saved, strict=True):
                    parameter.ds_secondary_tensor = None
                    parameter.ds_tensor.copy_(weights)


def check(optimizer: WindowedStage3) -> None:
    """Refuse to score where a rank holds a part of a layer, or of a row.

    Raises:
        EngineError: Names the option and the remedy.
    """
    remedy = "score layers by their weights (sampler weight_norm), or on ranks that share the data alone"
    group = optimizer.model_parallel_group
    if group is not None and dist.get_world_size(group) > 1:
        raise EngineError(
            f"scores from gradients: {dist.get_world_size(group)} ranks share each layer (mpu, or tensor_parallel.autotp_size), "
            f"where a gradient is not whole on any of them; {remedy}"
        )
    if optimizer.sequence_parallel_size > 1:
        raise EngineError(
            f"scores from gradients: {optimizer.sequence_parallel_size} ranks share each sequence, where a gradient is not whole on "
            f"any of them; {remedy}"
        )


@contextmanager
def _in_step(module: nn.Module, group: Any, device: torch.device) -> Iterator[Callable[[bool], None]]:
    """Synchronise ranks at each forward of ``module``, so that one without a further batch leaves no other waiting.

    Yields:
        A function that a rank calls with False when it has no batch left.
    """
    met = [0]

    def meet(goes_on: bool) -> None:
        flags = torch.tensor([goes_on, not goes_on], dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        if all(flags.tolist()):
            what = "would go on" if goes_on else "has no more"
            raise EngineError(
                f"calibration: the ranks yield different numbers of losses: rank {dist.get_rank()} {what} after {met[0]} forward "
                "passes; give every rank as many batches (DistributedSampler with drop_last=True)"
            )
        met[0] += 1

    handle = module.register_forward_pre_hook(lambda *_: meet(True), prepend=True)
    try:
        yield meet
    finally:
        handle.remove()
