"""What the ranks of tests/engines/test_protocol.py do: of an engine nothing is used but what the Protocol names, and its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from lisa_ds.engines.common.protocol import Engine
from lisa_ds.layers import Unit
from tests.engines.ddp_engine import DdpEngine
from tests.zero3 import trajectory
from tests.zero3.engine_runs import build_engine
from tests.zero3.trajectory import LAYERS, MICRO_BATCH, ROLES, Case, Outcome

UNITS: tuple[Unit, ...] = (*range(LAYERS), *ROLES)


@dataclass
class Driven:
    """An engine, and how a step is made of it."""

    engine: Engine
    backward: Callable[[Tensor, bool], float]
    """Of a micro-batch of this rank, and whether it is the last one of its step; the loss."""
    step: Callable[[], float]
    """The norm of the whole gradient, as it was limited."""
    copies: int
    """Ranks on which each element of state lies."""


def drive_ddp(case: Case) -> Driven:
    model = trajectory.build_model(case.tied).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})  # type: ignore[operator]
    engine = DdpEngine(model, case)
    return Driven(engine, lambda rows, last: engine.backward(rows), engine.step, copies=dist.get_world_size())


def drive_zero3(case: Case) -> Driven:
    engine = build_engine(case)

    def backward(rows: Tensor, last: bool) -> float:
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        if not last:
            engine.step()  # of DeepSpeed: on to the next micro-batch
        return float(loss)

    def step() -> float:
        engine.step()
        return float(engine.get_global_grad_norm())

    return Driven(engine, backward, step, copies=1)


def run_case(case: Case) -> Outcome:
    driven = drive_ddp(case)
    engine: Any = driven.engine
    losses, norms, layers = [], [], []
    for micro in trajectory.micro_batches(case, dist.get_world_size()):
        layers.append(driven.engine.sampled_layers)
        own = backward(driven, micro)
        mean = torch.tensor([sum(own) / len(own) / dist.get_world_size()])
        dist.all_reduce(mean)
        losses.append(float(mean))
        norms.append(driven.step())
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    extra = {"history": engine.run.history, "report": driven.engine.memory_report()}
    return Outcome(losses, norms, weights, layers, extra)


def run_cases(cases: list[Case]) -> dict[str, Outcome]:
    return {case.name: run_case(case) for case in cases}


def backward(driven: Driven, micro: list[Tensor]) -> list[float]:
    """This rank's losses on its rows of a step's micro-batches."""
    rank = dist.get_rank()
    own = [batch[rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH] for batch in micro]
    return [driven.backward(rows, number == len(own)) for number, rows in enumerate(own, start=1)]


# ---- what it says ----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """Between the last backward of a step and the step; ``norm`` is of the step."""

    layers: tuple[int, ...]
    roles: tuple[str, ...]
    squares: dict[Unit, float]
    state: dict[Unit, tuple[float, float]]
    """Of each unit that has state: its steps, and the square of the norm of its first moment over all ranks."""
    norm: float = 0.0


@dataclass
class Switched:
    """Steps by unit, and bytes, before a switch by the caller, after it, and after the way back."""

    goes: int
    stays: int
    comes: int
    before: dict[Unit, float]
    after: dict[Unit, float]
    again: dict[Unit, float]
    exp_avg: list[int]
    present: tuple[str, ...]
    ranks: list[str]


@dataclass
class Said:
    steps: list[Step]
    switched: Switched


def run_what_engines_say(of_both: list[Case], of_zero3: list[Case]) -> dict[tuple[str, str], Said]:
    deepspeed.init_distributed(dist_backend="gloo")
    said = {}
    for name, drive, cases in (("ddp", drive_ddp, of_both), ("zero3", drive_zero3, of_both + of_zero3)):
        for case in cases:
            driven = drive(case)
            said[name, case.name] = Said(_steps(driven, case), _switched(driven.engine))
            getattr(driven.engine, "destroy", lambda: None)()
    return said


def _steps(driven: Driven, case: Case) -> list[Step]:
    engine, seen = driven.engine, []
    for micro in trajectory.micro_batches(case, dist.get_world_size()):
        backward(driven, micro)
        squares = {unit: float(square) for unit, square in engine.unit_squares().items()}
        step = Step(engine.sampled_layers, engine.sampled_roles, squares, _state(engine, driven.copies))
        step.norm = driven.step()
        seen.append(step)
    return seen


def _state(engine: Engine, copies: int) -> dict[Unit, tuple[float, float]]:
    found = {}
    for unit in UNITS:
        if pieces := engine.state_of(unit):
            square = torch.zeros((), dtype=torch.float64, device=engine.ranks.device)
            for piece in pieces:
                square += piece["exp_avg"].double().square().sum() if "exp_avg" in piece else 0.0
            engine.ranks.add(square)
            found[unit] = (_steps_of(engine, unit), float(square) / copies)
    return found


def _steps_of(engine: Engine, unit: Unit) -> float:
    return max((float(piece["step"]) for piece in engine.state_of(unit) if "step" in piece), default=0.0)


def _switched(engine: Engine) -> Switched:
    goes, stays = engine.sampled_layers
    comes = next(layer for layer in range(LAYERS) if layer not in (goes, stays))
    roles = engine.sampled_roles

    def ages() -> dict[Unit, float]:
        return {layer: _steps_of(engine, layer) for layer in engine.sampled_layers}

    before, bytes_of = ages(), [engine.memory_report()["exp_avg"]]
    engine.train_units(sorted((stays, comes)), roles)
    after = ages()
    bytes_of.append(engine.memory_report()["exp_avg"])
    engine.train_units((goes, stays), roles)
    bytes_of.append(engine.memory_report()["exp_avg"])
    texts = engine.ranks.texts(str(dist.get_rank()))
    return Switched(goes, stays, comes, before, after, ages(), bytes_of, engine.present(ROLES), texts)
