"""A model of which not all is used at every step, trained on ranks and by plain torch in one process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lisa_ds
from lisa_ds.errors import CheckpointError

LAYERS, WIDTH, STEPS = 3, 10, 9
RATE, DECAY, EPS, CLIP = 1e-2, 0.1, 1e-4, 0.5


@dataclass(frozen=True)
class Case:
    name: str
    optimizer: str = "masked_adamw"
    accumulation: int = 1
    offload: bool = False
    recompute: bool = False
    leaf: bool = True
    stop_at: int | None = None  # save there, and go on in a fresh engine
    frozen: tuple[str, ...] = ()  # parameters whose names begin so are frozen beforehand
    lisa: dict[str, Any] = field(default_factory=dict)


class Block(nn.Module):
    """Some of it is never used, some at every other step, some in the first or in the last micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, 7)
        self.every_other = nn.Linear(WIDTH, WIDTH, bias=False)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, step: int, micro: int, accumulation: int) -> Tensor:
        x = x + self.always(x).tanh()
        if step % 2:
            x = x + self.every_other(x).tanh()
        if micro == 0:
            x = x + self.first(x).tanh()
        if micro == accumulation - 1:
            x = x + self.last(x).tanh()
        return x


class Mixture(nn.Module):
    """Expert 0 is one rank's alone, 1 everyone's, 2 no one's, and 3 the last rank's at some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, step: int, rank: int, ranks: int) -> Tensor:
        chosen = [1, *([0] if rank == 0 else []), *([3] if rank == ranks - 1 and step % 3 == 2 else [])]
        for i in chosen:
            x = x + self.experts[i](x).tanh()
        return x


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.embed = nn.Embedding(31, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.tower = nn.Sequential(nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH))  # of images, of which there are none
        self.mixture = Mixture() if case.leaf else None
        self.head = nn.Linear(WIDTH, 31)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(case.frozen))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, rows: Tensor, step: int, micro: int, rank: int, ranks: int) -> Tensor:
        x = self.embed(rows)
        for layer in self.layers:
            arguments = (x, step, micro, self.case.accumulation)
            x = checkpoint(layer, *arguments, use_reentrant=False) if self.case.recompute else layer(*arguments)
        if self.mixture is not None:
            x = self.mixture(x, step, rank, ranks)
        return nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def rows_of(step: int, micro: int, rank: int) -> Tensor:
    return torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(1000 * step + 10 * micro + rank))


def reference(case: Case, ranks: int, sampled: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Plain torch in one process; what leaves the sampled blocks loses its state."""
    model = Model(case)
    named = dict(model.named_parameters())
    optimizers: dict[str, torch.optim.AdamW] = {}
    for step in range(STEPS):
        drawn = {name for name in named if not name.startswith("layers.") or int(name.split(".")[1]) in sampled[step]}
        inside = {name for name in drawn if not name.startswith(case.frozen)}
        for name, parameter in named.items():
            parameter.requires_grad_(name in inside)
            if name not in inside:
                optimizers.pop(name, None)
            elif name not in optimizers:
                optimizers[name] = torch.optim.AdamW([parameter], lr=RATE, eps=EPS, weight_decay=DECAY)
        for micro, rank in itertools.product(range(case.accumulation), range(ranks)):
            loss = model(rows_of(step, micro, rank), step, micro, rank, ranks)
            (loss / ranks / case.accumulation).backward()
        nn.utils.clip_grad_norm_(named.values(), CLIP)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def _engine(case: Case, lisa: bool) -> Any:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    model = Model(case).train()
    if case.leaf:
        set_z3_leaf_modules(model, [Mixture])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPS, weight_decay=DECAY)
    if not lisa:
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    section = {"num_sampled_layers": 1, "interval_steps": 4, "seed": 1, "optimizer": case.optimizer, **case.lisa}
    return lisa_ds.initialize(model=model, optimizer=optimizer, config=config, lisa_config=section)[0]


def _train(engine: Any, case: Case, steps: range) -> list[tuple[int, ...]]:
    rank, ranks, sampled = dist.get_rank(), dist.get_world_size(), []
    for step in steps:
        sampled.append(getattr(engine, "sampled_layers", tuple(range(LAYERS))))
        for micro in range(case.accumulation):
            engine.backward(engine(rows_of(step, micro, rank), step, micro, rank, ranks))
            engine.step()
    return sampled


def _weights(engine: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def trained(cases: list[Case], folder: str, lisa: bool = True) -> dict[str, Any]:
    """Sampled blocks of each step, weights after the last, and bytes of state, for each case."""
    results: dict[str, Any] = {}
    for case in cases:
        engine = _engine(case, lisa)
        if case.stop_at is None:
            sampled = _train(engine, case, range(STEPS))
        else:
            sampled = _train(engine, case, range(case.stop_at))
            place = str(Path(folder) / case.name.replace(" ", "_"))
            engine.save_checkpoint(place)
            engine = _engine(case, lisa)
            engine.load_checkpoint(place)
            sampled += _train(engine, case, range(case.stop_at, STEPS))
        report = engine.memory_report() if lisa else {}
        results[case.name] = sampled, _weights(engine), report
    return results


def frozen_runs(cases: list[Case], folder: str) -> dict[str, Any]:
    """As :func:`trained`; and the notices, and what a resume with other frozen parameters says."""
    import logging

    notices: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lisa_ds").addHandler(handler)
    told: dict[str, list[str]] = {}
    results: dict[str, Any] = {}
    for case in cases:
        notices.clear()
        results |= trained([case], folder)
        told[case.name] = [line for line in dict.fromkeys(notices) if "frozen" in line]
    engine = _engine(cases[0], lisa=True)
    engine.save_checkpoint(folder, tag="saved")
    message = "nothing was refused"
    try:
        _engine(Case("other", leaf=False, frozen=("embed", "layers.0")), lisa=True).load_checkpoint(folder, tag="saved")
    except CheckpointError as error:
        message = str(error)
    return {"runs": results, "told": told, "resume": message}
