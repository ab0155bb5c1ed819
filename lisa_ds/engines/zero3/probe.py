"""Scores of all blocks from gradients on calibration data, without ever holding the gradients of all of them.

Note on what is kept.
    A gradient is taken as backward hands it over, put to its use and freed before the next one comes: nothing but numbers remains
    of it, or its part in a sum that is partitioned over the ranks. Where sums must be held, the blocks are scored a few at a
    time, in several passes over the calibration data. :func:`lisa_ds.memory.probe_bytes` says what that takes.
    Gradients are those of the weights as they are trained, in their dtype; the loss is not scaled, so fp16 gradients may vanish.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from lisa_ds.engines.zero3.detour import detour, partitioned, release
from lisa_ds.engines.zero3.frontier import BackwardFrontier
from lisa_ds.engines.zero3.partitions import fill
from lisa_ds.engines.zero3.window import WindowedStage3
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack

logger = logging.getLogger("lisa_ds")

Calibration = Callable[[nn.Module], Iterable[Tensor]]
"""A generator function: from the partitioned model, one loss ``()`` a batch of this rank's share of the calibration data.

It is called once a pass, must begin anew each time with the same data, and run forward for a batch only when that is asked for.
Every rank yields the same number of losses.
"""

KINDS = ("accumulated", "mean", "empirical", "hutchinson")

_CHUNK = 2**20  # elements worked on at a time, as lisa_ds.memory.probe says
_EPSILON = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 4e-3}


class Probe:
    """Scores every block of a model under ZeRO-3, between two optimizer steps.

    Only parameters that train when their block is sampled count. The optimizer's state, its gradients, the weights, the modules'
    modes and the generators of random numbers are afterwards what they were, to the bit.

    Args:
        optimizer: The engine's.
        module: The partitioned model.
        stack: The same model, taken apart.
        frontier: The engine's.
        calibration: See :data:`Calibration`.
        probe_blocks: Blocks scored at a time by ``accumulated`` and ``hutchinson``.
        seed: Of the directions of ``hutchinson``.
        epsilon: How far ``hutchinson`` moves each weight; by default 1e-3 in fp32, 1e-2 in bf16.

    Raises:
        EngineError: Ranks share layers or sequences.
    """

    def __init__(
        self,
        optimizer: WindowedStage3,
        module: nn.Module,
        stack: LayerStack,
        frontier: BackwardFrontier,
        calibration: Calibration,
        *,
        probe_blocks: int = 1,
        seed: int = 0,
        epsilon: float | None = None,
    ) -> None:
        check(optimizer)
        self._optimizer, self._module, self._stack, self._frontier = optimizer, module, stack, frontier
        self._calibration = calibration
        self._probe_blocks = max(1, min(probe_blocks, len(stack.layers)))
        owned = optimizer.owned()
        self._parameters: list[list[Any]] = [
            [parameter for parameter in block.parameters() if id(parameter) in owned] for block in stack.layers
        ]
        self._key_of = {
            id(parameter): _key(seed, number) for number, parameter in enumerate(module.parameters())
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
                one random ``v`` of signs. ``H v`` is the central difference of gradients at weights moved by ``epsilon * v``
                one way and the other. It may be negative. Two passes for each ``probe_blocks`` blocks. Blocks moved at the
                same time add their cross terms, whose mean is zero; ``probe_blocks: 1`` has none. In fp32 the difference is
                good to about three digits; weights and gradients in 16 bits leave the order of magnitude.

        Raises:
            EngineError: The ranks yield different numbers of losses, a loss depends on no block, or a score is not finite.
        """
        if kind not in KINDS:
            raise EngineError(f"probe: there is no kind {kind!r}; use one of {', '.join(KINDS)}")
        every = range(len(self._stack.layers))
        if kind == "mean":
            found = self._pass(kind, "pass 1 of 1", every, Norms)
        elif kind == "empirical":
            found = self._pass(kind, "pass 1 of 1", every, Squares)
        else:
            windows = [every[i : i + self._probe_blocks] for i in every[:: self._probe_blocks]]
            found = []
            for number, blocks in enumerate(windows, start=1):
                label = f"pass {number} of {len(windows)}"
                found += (
                    self._pass(kind, label, blocks, Sums) if kind == "accumulated" else self._curvature(label, blocks)
                )
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
            detour(
                self._optimizer,
                self._module,
                self._stack,
                self._frontier,
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

    def _agreed(self, scores: list[float], kind: str) -> list[float]:
        agreed = torch.tensor(scores, dtype=torch.float64, device=self._device)
        dist.broadcast(agreed, 0)
        result: list[float] = agreed.tolist()
        if bad := [block for block, finite in enumerate(agreed.isfinite().tolist()) if not finite]:
            raise EngineError(
                f"the scores ({kind}) of layers {bad} are not finite: gradients overflow on the calibration data; score in bf16 or "
                "fp32, or leave out batches without labels"
            )
        return result

    # ---- curvature ------------------------------------------------------------------------------------------------

    def _curvature(self, label: str, blocks: Sequence[int]) -> list[float]:
        parameters = [parameter for block in blocks for parameter in self._parameters[block]]
        epsilon = self._epsilon or _EPSILON[parameters[0].ds_tensor.dtype if parameters else torch.float32]
        slopes = []
        with self._saved(parameters) as saved:
            for sign in (1, -1):
                with partitioned(self._optimizer), torch.no_grad():
                    for parameter, weights in zip(parameters, saved, strict=True):
                        parameter.ds_secondary_tensor = None
                        parameter.ds_tensor.copy_(weights)
                        fill(parameter, _mover(sign * epsilon, self._key_of[id(parameter)]))
                side = "above" if sign > 0 else "below"
                slopes.append(self._pass("hutchinson", f"{label}, {side}", blocks, Slopes))
        return [(above - below) / (2 * epsilon) for above, below in zip(*slopes, strict=True)]

    @contextmanager
    def _saved(self, parameters: Sequence[Any]) -> Iterator[list[Tensor]]:
        """Put the partitions of ``parameters`` back afterwards, as they are now, whatever happens inside."""
        saved = [parameter.ds_tensor.detach().clone() for parameter in parameters]
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
    """Have the ranks meet at each forward of ``module``, so that one without a further batch does not leave the others waiting.

    Yields:
        What a rank calls with False when it has no batch left.
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


# ---- what is made of gradients as they come ----------------------------------------------------------------------------


class Collector(Protocol):
    """Makes a number for each block of gradients that come one at a time."""

    additive: bool
    """Whether a gradient may come in parts."""

    def __init__(self, blocks: list[list[Any]], group: Any, device: torch.device, key_of: dict[int, int]) -> None: ...

    def take(self, parameter: Any) -> None:
        """Use ``parameter.grad``, and free it."""

    def batch_done(self) -> None:
        """All gradients of a batch have come."""

    def result(self, batches: int) -> list[float]:
        """A number for each block, once all ``batches`` are done; a collective of all ranks."""


class _Collector:
    additive = True

    def __init__(self, blocks: list[list[Any]], group: Any, device: torch.device, key_of: dict[int, int]) -> None:
        self._blocks, self._group, self._device, self._key_of = blocks, group, device, key_of
        self._ranks = dist.get_world_size(group)
        self._block_of = {id(parameter): i for i, block in enumerate(blocks) for parameter in block}

    def batch_done(self) -> None:
        pass


class Sums(_Collector):
    """Keeps this rank's partition of the sum of each gradient, in fp32."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        parameters = list(itertools.chain.from_iterable(self._blocks))
        sizes = [-(-parameter.ds_numel // self._ranks) for parameter in parameters]
        sums = torch.zeros(sum(sizes), dtype=torch.float32, device=self._device)
        starts = itertools.accumulate(sizes, initial=0)
        self._sum_of = {
            id(parameter): sums.narrow(0, start, size)
            for parameter, start, size in zip(parameters, starts, sizes, strict=False)
        }

    def take(self, parameter: Any) -> None:
        self._sum_of[id(parameter)].add_(_own_part(parameter, self._group))

    def result(self, batches: int) -> list[float]:
        squares = torch.zeros(len(self._sum_of), dtype=torch.float64, device=self._device)
        for part, square in zip(self._sum_of.values(), squares, strict=True):
            _add_squares(part, square)
        dist.all_reduce(squares, group=self._group)
        norms = iter((squares.sqrt() / self._ranks).tolist())
        return [sum(itertools.islice(norms, len(block))) for block in self._blocks]


class Norms(_Collector):
    """Keeps the norm of each block's gradient, averaged over ranks, of each batch."""

    additive = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._squares = torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)
        self._batches: list[list[float]] = []

    def take(self, parameter: Any) -> None:
        _add_squares(_own_part(parameter, self._group), self._squares[self._block_of[id(parameter)]])

    def batch_done(self) -> None:
        self._batches.append(self._squares.tolist())
        self._squares.zero_()

    def result(self, batches: int) -> list[float]:
        squares = torch.tensor(self._batches, dtype=torch.float64, device=self._device)
        dist.all_reduce(squares, group=self._group)
        norms: list[float] = (squares.sqrt() / self._ranks).mean(0).tolist()
        return norms


class Squares(_Collector):
    """Keeps the sum of the squares of each block's gradients, each rank's for itself."""

    additive = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._squares = torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)

    def take(self, parameter: Any) -> None:
        _add_squares(parameter.grad.reshape(-1), self._squares[self._block_of[id(parameter)]])
        parameter.grad = None

    def result(self, batches: int) -> list[float]:
        dist.all_reduce(self._squares, group=self._group)
        means: list[float] = (self._squares / (batches * self._ranks)).tolist()
        return means


class Slopes(_Collector):
    """Keeps the product of each block's gradient with its direction."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._products = torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)

    def take(self, parameter: Any) -> None:
        gradient, key = parameter.grad.reshape(-1), self._key_of[id(parameter)]
        product = self._products[self._block_of[id(parameter)]]
        for start in range(0, gradient.numel(), _CHUNK):
            part = gradient[start : start + _CHUNK]
            signs = rademacher(key, start, part.numel(), part.device)
            product.add_(part.double().mul_(signs).sum())
        parameter.grad = None

    def result(self, batches: int) -> list[float]:
        dist.all_reduce(self._products, group=self._group)
        means: list[float] = (self._products / (batches * self._ranks)).tolist()
        return means


def _own_part(parameter: Any, group: Any) -> Tensor:
    """This rank's partition of the gradient, summed over ranks: ``(ceil(numel / ranks),)``, fp32 if there are several ranks.

    The gradient itself is let go of.
    """
    gradient, ranks = parameter.grad, dist.get_world_size(group)
    parameter.grad = None
    if ranks == 1:
        return gradient.reshape(-1)
    size = -(-gradient.numel() // ranks)
    padded = torch.empty(size * ranks, dtype=torch.float32, device=gradient.device)
    padded[: gradient.numel()].view_as(gradient).copy_(gradient)
    padded[gradient.numel() :].zero_()
    own = padded.narrow(0, size * dist.get_rank(group), size)
    dist.reduce_scatter_fn(own, padded, group=group)  # into a part of its own input, as Stage 3 has it
    return own


def _add_squares(values: Tensor, total: Tensor) -> None:
    """Add the squares of ``values`` ``(n,)`` to ``total`` ``()``, in fp64."""
    for start in range(0, values.numel(), _CHUNK):
        total.add_(torch.linalg.vector_norm(values[start : start + _CHUNK], dtype=torch.float64).square_())


# ---- directions --------------------------------------------------------------------------------------------------------


def rademacher(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Random signs, from ``start`` on, of the direction that ``key`` names: ``(count,)``, int64, each 1 or -1.

    Each is a hash of its index, the finaliser of MurmurHash3 twice: any part of a direction can be had on any device by itself.
    """
    signs = torch.arange(start, start + count, device=device)
    _mix(signs)
    _mix(signs.bitwise_xor_(key))
    return signs.bitwise_and_(1).mul_(2).sub_(1)


def _mix(values: Tensor) -> None:
    """Hash 32-bit numbers, kept in int64 so that a shift brings in zeros, in place."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values.bitwise_xor_(values >> shift).mul_(factor).bitwise_and_(0xFFFFFFFF)
    values.bitwise_xor_(values >> 16)


def _key(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest(), "little")


def _mover(amount: float, key: int) -> Callable[[Tensor, int], None]:
    def move(weights: Tensor, first: int) -> None:
        for start in range(0, weights.numel(), _CHUNK):
            part = weights[start : start + _CHUNK]
            signs = rademacher(key, first + start, part.numel(), part.device)
            part.copy_(torch.add(part.float(), signs, alpha=amount))

    return move
