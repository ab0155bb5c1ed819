"""Trains SmolLM2 on GSM8K by the method of a peer, on one process, and records held-out loss, bytes of state and seconds per step.

Rows, tokens, loss on answers, held-out parts and learning-rate schedule are those of ``benchmarks/ablate_run.py``; there is no DeepSpeed.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import ablate_run
import torch
from ablate_plan import DATA, MODEL
from torch import Tensor

from lisa_ds import records
from lisa_ds.cache import cache_dir

NAME = "peers"


class Method(Protocol):
    """A way to train a model."""

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step; told before its backward pass."""

    def step(self) -> None:
        """One step from the gradients that are there; they are let go of."""

    def held(self) -> Iterable[Tensor]:
        """What it keeps beside the model's weights and gradients."""


Make = Callable[[Any, argparse.Namespace], tuple[str, Any, Method, dict[str, Any]]]
"""From the model and the command line: what the records call it, the model to train, the method, and more settings for the records."""


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all peers have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    made.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the data sets lie")
    made.add_argument("--cache", type=Path, default=cache_dir() / "ablate", help="tokens are kept here")
    made.add_argument("--model", default=MODEL)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weights")
    made.add_argument("--max-length", type=int, default=128, help="longer rows are dropped")
    made.add_argument("--steps", type=int, default=150)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--every", type=_steps, default=5, help="steps for which a block is active, 2 or more")
    made.add_argument("--select-rows", type=int, default=48)
    made.add_argument("--verdict-rows", type=int, default=96)
    return made


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"should be a number of steps, 2 or more, got {text!r}")
    return int(text)


def main(make: Make, arguments: argparse.Namespace) -> None:
    """Train, measure, append the records."""
    source = {**DATA["gsm8k"], "path": str(arguments.data / DATA["gsm8k"]["path"]), "max_length": arguments.max_length}
    bench = ablate_run.Bench(
        arguments.model,
        {"gsm8k": source},
        str(arguments.cache),
        {"select": arguments.select_rows, "verdict": arguments.verdict_rows},
        arguments.device,
        arguments.dtype == "bfloat16",
    )
    torch.manual_seed(arguments.seed)
    variant, model, method, more = make(copy.deepcopy(bench.pristine), arguments)
    found = train(model, method, batches(bench.rows["gsm8k"]["train"], arguments), arguments)
    model.eval()
    losses = bench.losses("gsm8k", lambda batch: ablate_run.answer_loss(plain(model), batch))
    known = ("model", "dtype", "max_length", "steps", "batch", "lr", "seed", "every", "select_rows", "verdict_rows")
    settings = {key: getattr(arguments, key) for key in known} | more
    for part, loss in losses.items():
        append(arguments, f"{NAME}_loss_{part}", variant, loss, "nats per token", settings)
    append(arguments, f"{NAME}_state", variant, found["bytes"], "bytes", settings)
    append(arguments, f"{NAME}_step", variant, records.spread(found["seconds"]), "s", settings)


def batches(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches without end, in an order that depends on the seed alone."""
    order = random.Random(arguments.seed)
    while True:
        shuffled = order.sample(rows, len(rows))
        for first in range(0, len(rows) - arguments.batch + 1, arguments.batch):
            batch = ablate_run.collate(shuffled[first : first + arguments.batch])
            yield {key: value.to(arguments.device) for key, value in batch.items()}


def train(model: Any, method: Method, data: Iterator[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step but the first, and the most bytes of gradients, optimizer state and what else a method keeps.

    Moments are there from the second step of an interval on, so one of a single step would not show them.
    """
    seconds: list[float] = []
    most = 0
    model.train()
    for step in range(arguments.steps):
        batch = next(data)
        start = time.perf_counter()
        method.set_lr(learning_rate(step, arguments.steps, arguments.lr))
        loss = ablate_run.answer_loss(plain(model), batch)
        loss.backward()
        trained = [weight for weight in model.parameters() if weight.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        # Before the step: after it a method may have switched, and dropped its moments.
        gradients = size(weight.grad for weight in trained if weight.grad is not None)
        most = max(most, gradients + size(method.held()))
        method.step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        if step:
            seconds.append(time.perf_counter() - start)
        if (step + 1) % max(1, arguments.steps // 10) == 0:
            print(f"step {step + 1} of {arguments.steps}: loss {float(loss.detach()):.4f}", flush=True)
    return {"seconds": seconds, "bytes": most}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over a tenth of the steps, then half a cosine to 0, as transformers' ``cosine`` has it."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plain(model: Any) -> Any:
    """The model that has the blocks and the head, of one that PEFT wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def append(
    arguments: argparse.Namespace, name: str, variant: str, value: float | records.Spread, unit: str, settings: Any
) -> None:
    """Append a record, and print it."""
    measured = value if isinstance(value, records.Spread) else records.Spread(value, value, value, 1)
    cuda = arguments.device == "cuda"
    record = records.Record(
        name=name,
        variant=variant,
        value=measured.value,
        low=measured.low,
        high=measured.high,
        n=measured.n,
        unit=unit,
        device=torch.cuda.get_device_name()
        if cuda
        else f"CPU, {torch.get_num_threads()} threads ({platform.machine()})",
        commit=records.commit(),
        versions=records.versions((*records.PACKAGES, "peft", "badam")),
        settings=settings,
    )
    records.append(arguments.out, record)
    print(f"{variant:>24}  {name:<20} {measured.value:12.6g} {unit}")
