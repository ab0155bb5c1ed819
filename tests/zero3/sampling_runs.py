"""What the ranks of tests/zero3/test_sampling.py do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lisa_ds
from lisa_ds.errors import LisaError
from lisa_ds.sampling.scores import LayerScores
from tests.zero3 import trajectory
from tests.zero3.engine_runs import full_parameters
from tests.zero3.trajectory import EPS

ROWS, BATCHES, STEPS, INTERVAL = 6, 3, 8, 2  # rows of a batch of all ranks: divisible by 1, 2 and 3


def data(batches: int, seed: int) -> list[Tensor]:
    """Batches of all ranks, ``(ROWS, 16)`` each."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 101, (ROWS, 16), generator=draw) for _ in range(batches)]


def share(batch: Tensor) -> Tensor:
    """This rank's rows."""
    size = ROWS // dist.get_world_size()
    return batch[dist.get_rank() * size :][:size]


def calibration(by_row: bool) -> Callable[[nn.Module], Iterator[Tensor]]:
    def losses(module: nn.Module) -> Iterator[Tensor]:
        for batch in data(BATCHES, seed=5):
            own = share(batch)
            for rows in own.split(1) if by_row else [own]:
                yield module(input_ids=rows, labels=rows).loss

    return losses


def build(lisa: dict[str, Any], *, shift: float = 0.0, dtype: str = "fp32") -> Any:
    model = trajectory.build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": None,
        "bf16": {"enabled": dtype == "bf16"},
    }
    sampler = lisa.get("sampler", {})
    optimizer = torch.optim.AdamW(trajectory.parameter_groups(model), lr=1e-3, eps=EPS)
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=optimizer,
        config=config,
        lisa_config={"num_sampled_layers": 2, "interval_steps": INTERVAL, **lisa},
        calibration=calibration(by_row=isinstance(sampler, dict) and sampler.get("name") == "fisher"),
    )
    return engine


def train(engine: Any, first: int = 0, after_step: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    scales, scores, losses = [], [], []
    for step, batch in enumerate(data(STEPS, seed=6)):
        if step < first:
            continue
        rows = share(batch)
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        optimizer = engine.optimizer
        scales.append({unit: optimizer._lr_scale(i) for i, unit in enumerate(optimizer._shown_units)})
        scores.append(engine._run.sampler.scores)
        engine.step()
        losses.append(loss.item())
        after_step(step)
    return {
        "history": engine.layer_history,
        "scores": scores,
        "scales": scales,
        "losses": losses,
        "probabilities": engine.probabilities,
        "parameters": full_parameters(engine),
        "state": engine._run.draws.state_dict(),
    }


def run_sampler(lisa: dict[str, Any]) -> dict[str, Any]:
    """A sampler from beginning to end."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine = build(lisa)
    found = train(engine)
    engine.destroy()
    return found


def run_resumed(cases: dict[str, dict[str, Any]], folder: Path, save_after: int) -> dict[str, dict[str, Any]]:
    """Each sampler uninterrupted, and resumed amid an interval in a fresh engine."""
    deepspeed.init_distributed(dist_backend="gloo")
    found = {}
    for name, lisa in cases.items():
        engine = build(lisa)

        def save(step: int, engine: Any = engine, name: str = name) -> None:
            if step + 1 == save_after:
                engine.save_checkpoint(str(folder / name), tag="amid")

        found[name] = {"uninterrupted": train(engine, after_step=save)}
        engine.destroy()
        engine = build(lisa, shift=0.5)
        engine.load_checkpoint(str(folder / name), tag="amid")
        found[name]["resumed"] = train(engine, first=save_after)
        engine.destroy()
    return found


def run_mistakes() -> dict[str, str]:
    """What ranks are told that would train apart, or have nothing to score layers on."""
    deepspeed.init_distributed(dist_backend="gloo")
    found = {}
    try:
        build({"seed": dist.get_rank()})
        found["configs differ"] = ""
    except LisaError as error:
        found["configs differ"] = str(error)
    engine = build({"sampler": {"name": "grad_norm", "score": "ema"}})
    if dist.get_rank() == 1:
        engine._run.sampler.set_scores([1.0, 0.0, 0.0, 0.0, 9.0], 0)
        engine._run.sampler.observe = lambda norms, interval: None  # a rank whose statistics went astray
    try:
        train(engine)
        found["scores differ"] = ""
    except LisaError as error:
        found["scores differ"] = str(error)
    engine.destroy()
    model = trajectory.build_model()
    try:
        lisa_ds.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 3},
            },
            lisa_config={"sampler": "grad_norm"},
        )
    except LisaError as error:
        found["no calibration"] = str(error)
    engine = build({"growth": {"patience": 1, "max_layers": 4}})
    try:
        for batch in data(INTERVAL, seed=6):
            rows = share(batch)
            engine(input_ids=rows, labels=rows).loss.backward()
            engine.step()
    except LisaError as error:
        found["no loss"] = str(error)
    return found


def run_corners(folder: Path) -> dict[str, Any]:
    """Where a first draw by scores meets a caller's own, a checkpoint from before it, or one that knows of no scores."""
    deepspeed.init_distributed(dist_backend="gloo")
    (folder / f"host{dist.get_rank()}").mkdir()
    recipe = {"sampler": {"name": "grad_norm", "draw": "successive", "inverse_probability_cap": 3.0}}
    found: dict[str, Any] = {}
    engine = build(recipe)
    engine.switch_to([1, 3])
    found["chosen"] = train(engine)
    engine.destroy()

    engine = build(recipe)
    engine.save_checkpoint(str(folder), tag="pending")
    found["first"] = train(engine)
    engine.destroy()
    engine = build(recipe, shift=0.5)
    engine.load_checkpoint(str(folder), tag="pending")
    found["second"] = train(engine)
    engine.destroy()

    engine = build({})
    rows = share(data(1, seed=6)[0])
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
    engine.save_checkpoint(str(folder), tag="older")
    found["older"] = engine.sampled_layers
    engine.destroy()
    file = folder / "older" / f"zero_pp_rank_{dist.get_rank()}_mp_rank_00_model_states.pt"
    saved = torch.load(file, weights_only=False)
    del saved["lisa"]["draws"]  # as written before there were scores
    torch.save(saved, file)
    engine = build(recipe, shift=0.5)
    engine.load_checkpoint(str(folder), tag="older")
    found["newer"] = train(engine, first=1)
    engine.destroy()

    os.chdir(folder / f"host{dist.get_rank()}")  # a disk of its own
    scores = (1.0, 2.0, 3.0, 4.0, 5.0) if dist.get_rank() else (9.0, 0.0, 0.0, 0.0, 9.0)
    LayerScores("mine", scores).write("scores.json")
    try:
        build({"sampler": {"name": "fixed_scores", "file": "scores.json", "floor": 0.0}})
        found["files"] = ""
    except LisaError as error:
        found["files"] = str(error)
    return found
