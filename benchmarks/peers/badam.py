"""BAdam (arXiv:2404.02827) beside ours: AdamW on one block at a time.

Usage: pip install --no-deps --target DIR badam
       PYTHONPATH=DIR python benchmarks/peers/badam.py --out docs/results/peers.jsonl [--steps 150] [--lr 1e-3] [--method package]

`--method package` is the authors' package; `own` is our block descent in the manner of its paper, for machines that do not have it;
`adamw` has all blocks active at once: AdamW on all of them. Embeddings, head and final norm are frozen, as in the package's default.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: its own directory would hide the package of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from peers import driver
from peers.blocks import ADAMW, BlockDescent
from torch import Tensor

from lisa_ds.layers import LayerStack


class Package:
    """The authors' optimizer."""

    def __init__(self, model: Any, every: int) -> None:
        try:
            block_optimizer = importlib.import_module("badam").BlockOptimizer
        except ModuleNotFoundError:
            sys.exit("badam: pip install --no-deps --target DIR badam, and set PYTHONPATH=DIR; or --method own")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it tells of every switch
            warnings.simplefilter("ignore")
            self.optimizer = block_optimizer(
                base_optimizer=torch.optim.AdamW(model.parameters(), lr=0.0, **ADAMW),
                named_parameters_list=list(model.named_parameters()),
                switch_block_every=every,
                switch_mode="random",
            )

    def set_lr(self, lr: float) -> None:
        """Of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> None:
        """One step."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer.step()

    def held(self) -> Iterator[Tensor]:
        """Moments, and the fp32 copies, which it makes of fp32 weights too."""
        for state in self.optimizer.base_optimizer.state.values():
            yield from (value for value in state.values() if value.dim())
        yield from self.optimizer.param_idx2hp.values()


def make(model: Any, arguments: argparse.Namespace) -> tuple[str, Any, driver.Method, dict[str, Any]]:
    """The model and its method."""
    if arguments.method == "package":
        return "badam", model, Package(model, arguments.every), {"method": f"package {metadata.version('badam')}"}
    model.requires_grad_(False)
    blocks = [list(block.parameters()) for block in LayerStack.from_model(model).layers]
    active = len(blocks) if arguments.method == "adamw" else 1
    method = BlockDescent(blocks, every=arguments.every, seed=arguments.seed, active=active)
    name = {"adamw": "adamw on all blocks", "own": "block descent"}[arguments.method]
    return name, model, method, {"method": arguments.method}


def main(words: list[str] | None = None) -> None:
    """Train and record."""
    parser = driver.parser(__doc__ or "")
    parser.add_argument("--method", choices=["package", "own", "adamw"], default="package")
    driver.main(make, parser.parse_args(words))


if __name__ == "__main__":
    main()
