"""Scores of blocks from gradients under ZeRO-3, against plain torch in one process; and training that does not notice them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_ds.engines.common.rademacher import key_of, rademacher
from tests.ranks import Runs, run_ranks
from tests.shortened import shortened
from tests.zero3 import trajectory
from tests.zero3.probe_runs import (
    SEED,
    batches,
    run_beside_training,
    run_bytes,
    run_mistakes,
    run_scores,
    run_shared_layers,
)
from tests.zero3.trajectory import LAYERS, Case

pytestmark = pytest.mark.multirank

PERSISTENT = {"stage3_param_persistence_threshold": 200}
CASES = [
    Case("plain", steps=2),
    Case("tied", steps=2, tied=True),
    Case("reentrant", steps=2, checkpointing="reentrant"),
    Case("non_reentrant", steps=2, checkpointing="non_reentrant"),
    Case("zero_init", steps=2, zero_init=True),
    Case("prefetch", steps=2, prefetch=True, zero=PERSISTENT),
    Case("cpu_offload_of_weights", steps=2, offload=True, offload_param=True),
]
ODD = ["plain", "reentrant"]
SIZES = {"plain": [1, 3, LAYERS]}  # of a window; elsewhere 3


def reference(parameters: dict[str, Tensor], world_size: int, kind: str, size: int) -> list[float]:
    """The scores by their definitions: one process, whole gradients of everything, and fp64 where a Hessian is wanted."""
    model: Any = trajectory.build_model(tied="lm_head.weight" not in parameters)
    model.load_state_dict(parameters, strict=False)
    model.double().eval() if kind == "hutchinson" else model.eval()
    unit_of = trajectory.units(model)
    names = [name for name, unit in unit_of.items() if isinstance(unit, int)]
    named = dict(model.named_parameters())
    leaves = [named[name] for name in names]

    def by_block(values: dict[str, float]) -> list[float]:
        return [sum(value for name, value in values.items() if unit_of[name] == block) for block in range(LAYERS)]

    def loss(rank: int, batch: int) -> Tensor:
        rows = batches(rank)[batch]
        result: Tensor = model(input_ids=rows, labels=rows).loss
        return result

    count = len(batches(0))
    if kind == "hutchinson":
        number = {name: i for i, name in enumerate(named)}
        direction = {
            name: rademacher(key_of(SEED, number[name]), 0, named[name].numel(), torch.device("cpu"))
            .double()
            .view_as(named[name])
            for name in names
        }
        mean = sum(loss(rank, batch) for rank in range(world_size) for batch in range(count)) / (world_size * count)
        slopes = torch.autograd.grad(mean, leaves, create_graph=True)
        result = []
        for first in range(0, LAYERS, size):
            window = range(first, min(first + size, LAYERS))
            inside = {name: direction[name] * (unit_of[name] in window) for name in names}
            slope = sum((g * inside[name]).sum() for name, g in zip(names, slopes, strict=True))
            curvature = torch.autograd.grad(slope, leaves, retain_graph=True)
            products = {n: float((c * direction[n]).sum()) for n, c in zip(names, curvature, strict=True)}
            result += [by_block(products)[block] for block in window]
        return result
    gradients = {
        (rank, batch): dict(zip(names, torch.autograd.grad(loss(rank, batch), leaves), strict=True))
        for rank in range(world_size)
        for batch in range(count)
    }
    means = [
        {name: sum(gradients[rank, batch][name] for rank in range(world_size)) / world_size for name in names}
        for batch in range(count)
    ]
    if kind == "accumulated":
        return by_block({name: float(sum(mean[name] for mean in means).norm()) for name in names})
    if kind == "mean":
        squares = [by_block({name: float(mean[name].square().sum()) for name in names}) for mean in means]
        return [sum(batch[block] ** 0.5 for batch in squares) / count for block in range(LAYERS)]
    every = [by_block({name: float(g.square().sum()) for name, g in each.items()}) for each in gradients.values()]
    return [sum(each[block] for each in every) / len(every) for block in range(LAYERS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs[tuple[int, str], list[dict[str, Any]]]:
    """By number of ranks and name of the case, what each rank saw."""
    folder, cases = tmp_path_factory.mktemp("scores"), {case.name: case for case in CASES}

    def run(key: tuple[int, str]) -> list[dict[str, Any]]:
        world_size, name = key
        sizes = SIZES.get(name, [3]) if world_size == 2 else [3]
        return run_ranks(world_size, run_scores, folder, cases[name], sizes, timeout_s=400)

    return Runs(run)


ALL = [(2, case.name) for case in CASES] + [(3, name) for name in ODD]
on_ranks = pytest.mark.parametrize(("world_size", "name"), shortened(ALL, (2, "plain")))


@pytest.mark.by_case("name")
@on_ranks
def test_scores_are_those_of_one_process(runs: Any, world_size: int, name: str) -> None:
    seen = runs[world_size, name][0]
    for (kind, size), scores in seen["scores"].items():
        expected = reference(seen["parameters"], world_size, kind, size)
        if kind == "hutchinson":
            # Of an exact Hessian. A central difference in fp32 errs by a share of the terms, which cancel in some sums.
            close = pytest.approx(expected, rel=1e-3, abs=2e-4 * max(map(abs, expected)))
        else:
            close = pytest.approx(expected, rel=1e-4)
        assert scores == close, (kind, size)


@pytest.mark.by_case("name")
@on_ranks
def test_scores_are_alike_on_all_ranks_and_disturb_nothing(runs: Any, world_size: int, name: str) -> None:
    ranks = runs[world_size, name]
    assert all(rank["scores"] == ranks[0]["scores"] for rank in ranks)
    assert [rank["changed"] for rank in ranks] == [[]] * world_size


@pytest.mark.more
def test_a_window_of_any_size_gives_the_same_sums(runs: Any) -> None:
    scores = runs[2, "plain"][0]["scores"]
    assert scores["accumulated", 1] == scores["accumulated", 3] == scores["accumulated", LAYERS]


@pytest.mark.more
def test_dropout_would_be_seen_in_the_scores(runs: Any) -> None:
    seen = runs[2, "plain"][0]
    assert seen["with dropout"] != pytest.approx(seen["scores"]["mean", 3], rel=1e-2)


BESIDE = [
    Case("plain", steps=4),
    Case("accumulation", steps=4, accumulation=2),
    Case("bf16", steps=4, dtype="bf16"),
    Case("reentrant", steps=4, checkpointing="reentrant"),
    Case("frozen_embeddings_reentrant", steps=4, checkpointing="reentrant", lisa={"embeddings": "never"}),
    Case("frozen_embeddings_non_reentrant", steps=4, checkpointing="non_reentrant", lisa={"embeddings": "never"}),
    Case("tied_zero_init", steps=4, tied=True, zero_init=True),
    Case("prefetch", steps=4, prefetch=True, zero=PERSISTENT),
    Case("offload", steps=4, offload=True, offload_param=True),
    Case("given_optimizer", steps=4, lisa={"optimizer": "adamw"}),
    Case("stochastic_rounding", steps=4, dtype="bf16", lisa={"optimizer": {"precision": "stochastic_rounding"}}),
]
SAME = {"losses": True, "grad_norms": True, "layers": True, "moved": []}


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Runs[str, list[dict[str, Any]]]:
    """By name of the case, what each rank saw; the plain one is also interrupted, and not put back."""
    folder, cases = tmp_path_factory.mktemp("beside"), {case.name: case for case in BESIDE}
    return Runs(lambda name: run_ranks(2, run_beside_training, folder, [cases[name]], timeout_s=400))


@pytest.mark.nightly
@pytest.mark.versions
@pytest.mark.parametrize("name", [*(case.name for case in BESIDE), "interrupted"])
def test_training_goes_on_to_the_bit(beside: Any, name: str) -> None:
    assert [rank[name] for rank in beside[name if name != "interrupted" else "plain"]] == [SAME, SAME]


@pytest.mark.nightly
def test_weights_that_are_not_put_back_are_seen(beside: Any) -> None:
    assert all(len(rank["unrestored"]["moved"]) > 10 for rank in beside["plain"])


@pytest.mark.more
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_scoring_keeps_alive_is_what_the_planner_says(tmp_path: Path, world_size: int) -> None:
    for seen in run_ranks(world_size, run_bytes, tmp_path, timeout_s=300):
        blocks = seen.pop("blocks")
        assert {key: peak for key, (peak, _) in seen.items()} == {key: planned for key, (_, planned) in seen.items()}
        for (_, kind, size), (peak, _) in seen.items():
            if kind == "accumulated":
                assert peak <= 4 * (size * max(blocks) / world_size + max(blocks))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, run_mistakes, tmp_path_factory.mktemp("mistakes"))


MISTAKES = {
    "counts": "calibration: the ranks yield different numbers of losses: rank 0 has no more after 2 forward passes; give every rank "
    "as many batches (DistributedSampler with drop_last=True)",
    "nothing": "calibration yielded no loss: it must yield one for each batch, anew at each call",
    "detached": "layers [0, 1, 2, 3, 4] got no gradient from any calibration batch: the loss does not depend on them, or reentrant "
    "checkpointing that is not transformers' own cuts them off; use torch.utils.checkpoint with use_reentrant=False there, or yield "
    "the loss itself, not a detached copy",
    "used_up": "calibration yielded no loss: it must yield one for each batch, anew at each call",
    "not_finite": "the scores (mean) of layers [0, 1, 2, 3, 4] are not finite: gradients overflow on the calibration data; score in "
    "bf16 or fp32, or leave out batches without labels",
    "kind": "probe: there is no kind 'gradient'; use one of accumulated, mean, empirical, hutchinson",
    "gradients_left": "there are gradients that no step has used yet; score layers between step() and forward()",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said_on_every_rank_and_change_nothing(said: list[dict[str, Any]], name: str) -> None:
    assert said[0][name] == MISTAKES[name]
    other = MISTAKES[name].replace("rank 0 has no more", "rank 1 would go on")
    assert said[1][name] == other
    assert [rank[f"{name}, changed"] for rank in said] == [[], []]


def test_a_block_without_gradient_in_a_batch_counts_nothing_for_it(said: list[dict[str, Any]]) -> None:
    for kind, share in (("accumulated", 1.0), ("mean", 0.5), ("empirical", 0.5)):
        both, one = said[0][kind], said[0][f"{kind}, one batch"]
        assert both[3:] == pytest.approx([share * score for score in one[3:]], rel=1e-6)
        assert both[:3] != pytest.approx([share * score for score in one[:3]], rel=1e-3)


def test_ranks_that_share_layers_are_refused(tmp_path: Path) -> None:
    assert set(run_ranks(2, run_shared_layers, tmp_path)) == {
        "scores from gradients: 2 ranks share each layer (mpu, or tensor_parallel.autotp_size), where a gradient is not whole on any "
        "of them; score layers by their weights (sampler weight_norm), or on ranks that share the data alone"
    }


def test_directions_are_fair_and_the_same_in_parts() -> None:
    whole = rademacher(key_of(0, 1), 0, 100_000, torch.device("cpu"))
    other = rademacher(key_of(0, 2), 0, 100_000, torch.device("cpu"))
    assert torch.equal(whole[70_000:], rademacher(key_of(0, 1), 70_000, 30_000, torch.device("cpu")))
    assert set(whole.tolist()) == {1, -1}
    for signs in (whole, whole * other, whole[1:] * whole[:-1], whole[1:] * other[:-1]):
        assert abs(float(signs.double().mean())) < 4 / 100_000**0.5
