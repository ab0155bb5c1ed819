"""BREAD (openreview DBybUx7ARy) beside ours: AdamW on one block, and from the same backward pass a cheap correction of the others.

Usage: python benchmarks/peers/bread.py --out docs/results/peers.jsonl [--correction low-rank] [--reach all] [--steps 150] [--lr 1e-3]

Written from the abstract and the method of its public code. `--correction low-rank`: the linears of the blocks have low-rank adapters, which stay in the model, and AdamW
trains those of the inactive blocks. `sgd`: the weights of the inactive blocks take a step of SGD while the gradients arrive, so
that none is kept. `--reach partial` corrects only the blocks that the backward pass reaches anyway: those above the active one. At a
switch the optimizer's state is dropped, the adapters' as well. Embeddings, head and final norm are frozen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from peers import driver
from peers.blocks import BlockDescent, Correction
from torch import Tensor, nn

from lisa_ds.layers import LayerStack

Blocks = Sequence[Sequence[nn.Parameter]]


class LowRank(Correction):
    """AdamW on the adapters of the inactive blocks.

    Args:
        adapters: Low-rank matrices of each block.
        partial: Only of blocks above the lowest active one.
    """

    def __init__(self, adapters: Blocks, partial: bool) -> None:
        self.adapters, self.partial = adapters, partial

    def switched(self, active: set[int]) -> list[nn.Parameter]:
        """See ``Correction``."""
        chosen = corrected(len(self.adapters), active, self.partial)
        for index, block in enumerate(self.adapters):
            for matrix in block:
                matrix.grad = None
                matrix.requires_grad_(index in chosen)
        return [matrix for index in sorted(chosen) for matrix in self.adapters[index]]

    def held(self) -> Iterator[Tensor]:
        """The matrices themselves, of all blocks."""
        return (matrix for block in self.adapters for matrix in block)


class Sgd(Correction):
    """SGD on the weights of the inactive blocks, one after another, as their gradients arrive. These gradients are not clipped.

    Args:
        blocks: Parameters of each block.
        partial: Only of blocks above the lowest active one.
        scale: Of AdamW's learning rate.
    """

    def __init__(self, blocks: Blocks, partial: bool, scale: float) -> None:
        self.blocks, self.partial, self.scale = blocks, partial, scale
        self.lr = 0.0
        self.chosen: set[int] = set()
        for index, block in enumerate(blocks):
            for weight in block:
                weight.requires_grad_(True).register_post_accumulate_grad_hook(self._hook(index))

    def switched(self, active: set[int]) -> list[nn.Parameter]:
        """See ``Correction``."""
        self.chosen = corrected(len(self.blocks), active, self.partial)
        for index in self.chosen:
            for weight in self.blocks[index]:
                weight.requires_grad_(True)
        return []

    def set_lr(self, lr: float) -> None:
        """Of the next step."""
        self.lr = lr

    def _hook(self, index: int) -> Any:
        def step(weight: Tensor) -> None:
            if index in self.chosen and weight.grad is not None:
                with torch.no_grad():
                    weight.add_(weight.grad, alpha=-self.lr * self.scale)
                weight.grad = None

        return step


def corrected(count: int, active: set[int], partial: bool) -> set[int]:
    """The inactive blocks that are corrected, of ``count``."""
    return {index for index in range(min(active) if partial else 0, count) if index not in active}


def with_adapters(model: Any, rank: int) -> Any:
    """``model`` with low-rank adapters on the linears of its blocks."""
    import peft

    stack = LayerStack.from_model(model)
    linears = {
        name.rpartition(".")[2] for name, module in stack.layers[0].named_modules() if isinstance(module, nn.Linear)
    }
    config = peft.LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=sorted(linears), task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def make(model: Any, arguments: argparse.Namespace) -> tuple[str, Any, driver.Method, dict[str, Any]]:
    """The model and its method."""
    low_rank, partial = arguments.correction == "low-rank", arguments.reach == "partial"
    model = with_adapters(model, arguments.rank) if low_rank else model
    model.requires_grad_(False)
    stack = LayerStack.from_model(model)
    own = [[w for name, w in block.named_parameters() if "lora_" not in name] for block in stack.layers]
    adapters = [[w for name, w in block.named_parameters() if "lora_" in name] for block in stack.layers]
    correction = LowRank(adapters, partial) if low_rank else Sgd(own, partial, arguments.sgd_scale)
    method = BlockDescent(own, every=arguments.every, seed=arguments.seed, correction=correction)
    more = {"rank": arguments.rank} if low_rank else {"sgd_scale": arguments.sgd_scale}
    name = f"bread {arguments.correction}" + ", partial" * partial
    return name, model, method, {**more, "correction": arguments.correction, "reach": arguments.reach}


def main(words: list[str] | None = None) -> None:
    """Train and record."""
    parser = driver.parser(__doc__ or "")
    parser.add_argument("--correction", choices=["low-rank", "sgd"], default="low-rank")
    parser.add_argument(
        "--reach", choices=["all", "partial"], default="all", help="which inactive blocks are corrected"
    )
    parser.add_argument("--rank", type=int, default=8, help="alpha is 4 times that, as in the authors' example")
    parser.add_argument("--sgd-scale", type=float, default=5.0, help="of AdamW's learning rate")
    driver.main(make, parser.parse_args(words))


if __name__ == "__main__":
    main()
