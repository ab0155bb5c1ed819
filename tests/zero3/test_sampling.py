"""Importance sampling on ZeRO-3 ranks: scores, draws and weights against plain torch in one process; resume; ranks that differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_ds.config import LisaConfig
from lisa_ds.sampling import LayerSampler
from tests.ranks import Runs, run_ranks
from tests.shortened import shortened
from tests.zero3 import trajectory
from tests.zero3.sampling_runs import (
    BATCHES,
    INTERVAL,
    ROWS,
    STEPS,
    data,
    run_corners,
    run_mistakes,
    run_resumed,
    run_sampler,
)
from tests.zero3.trajectory import EPS, LAYERS

pytestmark = [pytest.mark.multirank, pytest.mark.by_case("name")]

CASES: dict[str, dict[str, Any]] = {
    "weight_norm": {"sampler": {"name": "weight_norm", "temperature": 0.05}},
    "recipe": {"sampler": {"name": "grad_norm", "draw": "successive", "calibration_batches": BATCHES}},
    "two_blocks_at_a_time": {"sampler": {"name": "grad_norm", "probe_blocks": 2, "every": 2, "temperature": 0.2}},
    "mean": {"sampler": {"name": "grad_norm", "score": "mean", "inverse_probability_cap": 1.5, "temperature": 0.1}},
    "ema": {"sampler": {"name": "grad_norm", "score": "ema", "ema_decay": 0.5, "temperature": 0.1, "floor": 0.3}},
    "fisher": {"sampler": {"name": "fisher", "draw": "bernoulli"}},
    "growth": {"num_sampled_layers": 1, "growth": {"patience": 1, "threshold": 0.5, "max_layers": 4}},
    "schedule": {"num_sampled_layers": 1, "growth": {"schedule": {1: 2, 3: 5}}},
}
SHORT = ("weight_norm", "recipe", "growth")
RESUMED = ("recipe", "two_blocks_at_a_time", "ema", "growth")


Found = Runs[tuple[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By number of ranks and name of the case, what each rank found."""
    folder = tmp_path_factory.mktemp("runs")
    return Runs(lambda key: run_ranks(key[0], run_sampler, folder, CASES[key[1]]))


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return {name: reference(lisa) for name, lisa in CASES.items()}


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        *shortened([(size, name) for size in (1, 2) for name in CASES], *((2, name) for name in SHORT)),
        *(pytest.param(3, name, marks=pytest.mark.nightly) for name in RESUMED),
    ],
)
def test_layers_scores_and_weights_are_those_of_one_process(
    runs: Found, references: dict[str, dict[str, Any]], name: str, world_size: int
) -> None:
    expected = references[name]
    over_ranks = zip(*(rank["losses"] for rank in runs[world_size, name]), strict=True)
    assert [sum(losses) / world_size for losses in over_ranks] == pytest.approx(expected["losses"], abs=1e-5)
    first = runs[world_size, name][0]
    for found in runs[world_size, name]:
        assert found["history"] == expected["history"]
        for mine, its in zip(found["scores"], expected["scores"], strict=True):
            assert (mine is None) == (its is None)
            assert mine is None or mine == pytest.approx(its, rel=1e-4)
        for parameter, value in expected["parameters"].items():
            assert (found["parameters"][parameter] - value).abs().max() < 1e-6, parameter
        # Equal on all ranks to the bit, or they would drift apart.
        assert found["scores"] == first["scores"]
        assert found["probabilities"] == first["probabilities"]


def test_the_samplers_are_told_apart(references: dict[str, dict[str, Any]]) -> None:
    """The control: what is compared above differs between samplers, or a wrong one would pass."""
    histories = {name: tuple(outcome["history"]) for name, outcome in references.items()}
    assert len(set(histories.values())) >= 6
    scores = [outcome["scores"][-1] for outcome in references.values() if outcome["scores"][-1] is not None]
    assert all(a != pytest.approx(b, rel=1e-2) for i, a in enumerate(scores) for b in scores[:i])


def test_rates_follow_the_inverse_probability(runs: Found) -> None:
    for found in runs[2, "mean"]:
        sampler = LayerSampler(LAYERS, LisaConfig.load({"interval_steps": INTERVAL, **CASES["mean"]}))
        seen = set()
        for scores, scales in zip(found["scores"], found["scales"], strict=True):
            sampler.set_scores(scores, 0)
            chances = sampler.probabilities_at(0)
            for unit, scale in scales.items():
                wanted = min(1.5, 2 / LAYERS / chances[unit]) if isinstance(unit, int) else 1.0
                assert scale == pytest.approx(wanted)
                seen.add(round(scale, 3))
        assert len(seen) > 2


@pytest.mark.more
def test_a_resumed_run_draws_and_trains_on_to_the_bit(tmp_path_factory: pytest.TempPathFactory) -> None:
    cases = {name: CASES[name] for name in RESUMED}
    ranks = run_ranks(
        2, run_resumed, tmp_path_factory.mktemp("resume"), cases, tmp_path_factory.mktemp("saved"), 3, timeout_s=300
    )
    for rank in ranks:
        for name in RESUMED:
            first, second = rank[name]["uninterrupted"], rank[name]["resumed"]
            assert second["history"] == first["history"]
            assert second["scores"] == first["scores"][3:]
            assert second["losses"] == first["losses"][3:]
            assert second["state"] == first["state"]
            for parameter, value in first["parameters"].items():
                assert torch.equal(second["parameters"][parameter], value), (name, parameter)


def test_ranks_that_would_train_apart_stop(tmp_path_factory: pytest.TempPathFactory) -> None:
    for found in run_ranks(2, run_mistakes, tmp_path_factory.mktemp("mistakes"), timeout_s=200):
        assert found["configs differ"].startswith("the lisa config: ranks differ and would train apart: ranks [0]: ")
        assert '"seed":1' in found["configs differ"]
        assert "interval " in found["scores differ"]
        assert "ranks [0]: (" in found["scores differ"]
        assert "ranks [1]: (" in found["scores differ"]
        assert (
            "'grad_norm' measures scores on calibration batches: give initialize(..., calibration"
            in found["no calibration"]
        )
        assert found["no loss"].startswith("lisa.growth.patience: watches the loss that engine.backward(loss) is given")


@pytest.mark.more
def test_the_first_draw_waits_for_scores_unless_somebody_else_has_drawn(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for found in run_ranks(
        2, run_corners, tmp_path_factory.mktemp("corners"), tmp_path_factory.mktemp("saved"), timeout_s=300
    ):
        chosen, first, second, newer = (found[key] for key in ("chosen", "first", "second", "newer"))
        assert chosen["history"][0] == (1, 3)
        assert {scale for unit, scale in chosen["scales"][0].items() if isinstance(unit, int)} == {1.0}
        assert chosen["scores"][0] is None
        assert chosen["scores"][-1] is not None
        assert first["scores"][0] is not None
        assert {scale for scale in first["scales"][0].values()} != {1.0}
        assert second["history"] == first["history"]
        assert all(torch.equal(second["parameters"][name], value) for name, value in first["parameters"].items())
        assert newer["history"][0] == found["older"]
        assert newer["scores"][0] is None  # what was begun without scores is trained to the interval's end
        assert newer["scores"][1] is not None
        assert found["files"].startswith("the lisa config: ranks differ and would train apart")


# ---- the same runs in one process, by plain torch -----------------------------------------------------------------


def block_of(name: str) -> int | None:
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def gradients(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=rows, labels=rows).loss.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def measure(model: nn.Module, chosen: Any) -> list[float]:
    model.requires_grad_(True)
    batches = data(BATCHES, seed=5)
    if chosen.name == "weight_norm":
        squares = [0.0] * LAYERS
        for name, parameter in model.named_parameters():
            if (block := block_of(name)) is not None:
                squares[block] += float(parameter.detach().double().square().sum())
        return [math.sqrt(square) for square in squares]
    if chosen.name == "fisher":
        batches = [row for batch in batches for row in batch.split(1)]
    found = [gradients(model, batch) for batch in batches]
    scores = [0.0] * LAYERS
    if chosen.name == "grad_norm" and chosen.score == "accumulated":
        for name in found[0]:
            if (block := block_of(name)) is not None:
                scores[block] += float(torch.stack([g[name] for g in found]).double().sum(0).norm())
        return scores
    for one in found:
        squares = [0.0] * LAYERS
        for name, gradient in one.items():
            if (block := block_of(name)) is not None:
                squares[block] += float(gradient.double().square().sum())
        for block, square in enumerate(squares):
            scores[block] += (square if chosen.name == "fisher" else math.sqrt(square)) / len(found)
    return scores


def reference(lisa: dict[str, Any]) -> dict[str, Any]:
    config = LisaConfig.load({"interval_steps": INTERVAL, **lisa})
    chosen, sampler, model = config.sampler, LayerSampler(LAYERS, config), trajectory.build_model()
    named = dict(model.named_parameters())
    decay = {name: 0.1 if p.dim() > 1 else 0.0 for name, p in named.items()}
    optimizers: dict[str, torch.optim.AdamW] = {}
    history: list[tuple[int, ...]] = []
    scores: list[tuple[float, ...] | None] = []
    squares: list[list[float]] = [[] for _ in range(LAYERS)]
    losses: list[float] = []  # of the interval
    seen: list[float] = []
    for step, rows in enumerate([*data(STEPS, seed=6), None]):
        interval, within = divmod(step, INTERVAL)
        if not within:
            if step and chosen.name == "grad_norm" and chosen.score == "ema":
                sampler.observe([math.sqrt(sum(s) / len(s)) if s else None for s in squares], interval)
            if step and config.growth is not None and config.growth.patience:
                sampler.growth.observe(sum(losses) / len(losses))
            if (chosen.calibrates or chosen.name == "weight_norm") and interval % chosen.every == 0:
                sampler.set_scores(measure(model, chosen), interval)
            history.append(sampler.layers_at(interval))
            squares, losses = [[] for _ in range(LAYERS)], []
            for name, parameter in named.items():
                block = block_of(name)
                trains = block is None or block in history[-1]
                parameter.requires_grad_(trains)
                parameter.grad = None
                if not trains:
                    optimizers.pop(name, None)
                elif name not in optimizers:
                    optimizers[name] = torch.optim.AdamW([parameter], lr=1e-3, eps=EPS, weight_decay=decay[name])
        if rows is None:  # the engine has drawn once more after its last step
            break
        assert rows.shape[0] == ROWS
        scores.append(sampler.scores)
        loss = model(input_ids=rows, labels=rows).loss
        losses.append(loss.item())
        seen.append(loss.item())
        model.zero_grad()
        loss.backward()
        scales = sampler.lr_scales_of(history[-1], interval)
        for block in history[-1]:
            own = [p.grad for name, p in named.items() if block_of(name) == block and p.grad is not None]
            squares[block].append(float(sum(gradient.double().square().sum() for gradient in own)))
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = 1e-3 * scales.get(block_of(name), 1.0)  # type: ignore[arg-type]
            optimizer.step()
    return {
        "losses": seen,
        "history": history,
        "scores": scores,
        "parameters": {n: p.detach() for n, p in named.items()},
    }
