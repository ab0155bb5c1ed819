"""Collectors: reduce gradients, as backward yields them one parameter at a time, to a number for each block.

A collector takes ``parameter.grad`` and frees it before the next one comes. :func:`lisa_ds.memory.probe_bytes` counts
what it holds meanwhile; change both together.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from torch import Tensor

from lisa_ds.config.formats import SCORING_CHUNK as CHUNK
from lisa_ds.engines.common.rademacher import along
from lisa_ds.engines.common.scores import add_squares, mean_norms, means, summed_norms


class Collector(Protocol):
    """Reduces gradients that come one at a time to a number for each block."""

    additive: bool
    """Whether a gradient may come in several parts that are added up."""

    def __init__(self, blocks: list[list[Any]], group: Any, device: torch.device, key_of: dict[int, int]) -> None: ...

    def take(self, parameter: Any) -> None:
        """Collect ``parameter.grad``, and free it."""

    def batch_done(self) -> None:
        """Called when all gradients of a batch have come."""

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
            add_squares(part, square)
        dist.all_reduce(squares, group=self._group)
        return summed_norms(squares, map(len, self._blocks), self._ranks)


class Norms(_Collector):
    """Keeps the norm of each block's gradient, averaged over ranks, of each batch."""

    additive = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._squares = torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)
        self._batches: list[list[float]] = []

    def take(self, parameter: Any) -> None:
        add_squares(_own_part(parameter, self._group), self._squares[self._block_of[id(parameter)]])

    def batch_done(self) -> None:
        self._batches.append(self._squares.tolist())
        self._squares.zero_()

    def result(self, batches: int) -> list[float]:
        squares = torch.tensor(self._batches, dtype=torch.float64, device=self._device)
        dist.all_reduce(squares, group=self._group)
        return mean_norms(squares, self._ranks)


class Squares(_Collector):
    """Keeps the sum of the squares of each block's gradients, on each rank separately."""

    additive = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._squares = torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)

    def take(self, parameter: Any) -> None:
        add_squares(parameter.grad.reshape(-1), self._squares[self._block_of[id(parameter)]])
        parameter.grad = None

    def result(self, batches: int) -> list[float]:
        dist.all_reduce(self._squares, group=self._group)
        return means(self._squares, batches, self._ranks)


class Slopes(_Collector):
    """Keeps the inner product of each block's gradient with its Rademacher vector."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._products = torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)

    def take(self, parameter: Any) -> None:
        gradient, key = parameter.grad.reshape(-1), self._key_of[id(parameter)]
        product = self._products[self._block_of[id(parameter)]]
        for start in range(0, gradient.numel(), CHUNK):
            product.add_(along(gradient[start : start + CHUNK], key, start))
        parameter.grad = None

    def result(self, batches: int) -> list[float]:
        dist.all_reduce(self._products, group=self._group)
        return means(self._products, batches, self._ranks)


def _own_part(parameter: Any, group: Any) -> Tensor:
    """This rank's partition of the gradient, summed over ranks: ``(ceil(numel / ranks),)``, fp32 if there are several ranks.

    The gradient itself is freed.
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
