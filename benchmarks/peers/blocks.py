"""Block coordinate descent: AdamW on a few blocks at a time, whose state is dropped when others take their turn.

What BAdam (arXiv:2404.02827) does on one process, and what a method that corrects the other blocks meanwhile is built on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class Correction:
    """What happens to the blocks that are not active; here, nothing: they are frozen."""

    def switched(self, active: set[int]) -> list[nn.Parameter]:
        """Prepare for an interval in which ``active`` are the active blocks.

        Returns:
            Parameters, none of a block's own, that AdamW trains beside the active blocks.
        """
        return []

    def held(self) -> Iterator[Tensor]:
        """Tensors that it keeps beside the model's weights, their gradients and AdamW's state."""
        return iter(())

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""


class BlockDescent:
    """AdamW on ``active`` blocks for ``every`` steps, then on the next; a new random order whenever all had their turn.

    Blocks in 16 bits have an fp32 master copy while they are active. If all blocks are active there is nothing to switch, and this is
    AdamW.

    Args:
        blocks: Parameters of each block. Those of no block are frozen by the caller.
        every: Steps of an interval.
        seed: Of the order.
        active: Blocks at a time.
        correction: Of the others.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Parameter]],
        *,
        every: int,
        seed: int = 0,
        active: int = 1,
        correction: Correction | None = None,
    ) -> None:
        self.blocks, self.every, self.count = blocks, every, active
        self.correction = correction or Correction()
        self.steps = 0
        self._random = random.Random(seed)
        self._waiting: list[int] = []
        self._switch()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step; to be told before its backward pass."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.correction.set_lr(lr)

    def step(self) -> None:
        """One step from the gradients that are there; they are let go of."""
        for weight, master in self._masters:
            if weight is not master:
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in self._masters:
                if weight is not master:
                    weight.copy_(master)
        self.steps += 1
        if self.steps % self.every == 0 and self.count < len(self.blocks):
            self._switch()

    def held(self) -> Iterator[Tensor]:
        """What is kept beside the model's weights and gradients: moments, master copies, and what the correction keeps."""
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if value.dim())
        yield from (master for weight, master in self._masters if weight is not master)
        yield from self.correction.held()

    def _switch(self) -> None:
        if len(self._waiting) < self.count:
            self._waiting = self._random.sample(range(len(self.blocks)), len(self.blocks))
        self.active = {self._waiting.pop() for _ in range(self.count)}
        for index, block in enumerate(self.blocks):
            for weight in block:
                weight.grad = None
                weight.requires_grad_(index in self.active)
        beside = self.correction.switched(self.active)
        weights = [weight for index in sorted(self.active) for weight in self.blocks[index]]
        self._masters = [(weight, _master(weight)) for weight in weights]
        self.optimizer = torch.optim.AdamW([*(master for _, master in self._masters), *beside], lr=0.0, **ADAMW)


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
