"""The peers' methods, on models small enough to step by hand."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import badam, bread, driver
from peers.blocks import ADAMW, BlockDescent, Correction
from torch import Tensor, nn

from lisa_ds import records
from lisa_ds.layers import LayerStack
from tests import tiny

LR = 1e-2


def model(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.config(num_hidden_layers=4)).to(dtype)


def blocks_of(model: Any) -> list[list[nn.Parameter]]:
    model.requires_grad_(False)
    stack = LayerStack.from_model(model)
    return [[w for name, w in block.named_parameters() if "lora_" not in name] for block in stack.layers]


def backward(model: Any, step: int = 0) -> None:
    ids = torch.arange(5, 25)[None] + step
    model(input_ids=ids, labels=ids).loss.backward()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def train(model: Any, method: BlockDescent, steps: int) -> None:
    for step in range(steps):
        method.set_lr(LR / (1 + step))
        backward(model, step)
        method.step()


@pytest.mark.parametrize("active", [4, 1])
def test_with_all_blocks_active_it_is_adamw(active: int) -> None:
    ours, stock = model(), model()
    train(ours, BlockDescent(blocks_of(ours), every=2, active=active), 5)
    chosen = [weight for block in blocks_of(stock) for weight in block]
    for weight in chosen:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen, lr=0.0, **ADAMW)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = LR / (1 + step)
        backward(stock, step)
        optimizer.step()
        optimizer.zero_grad()
    same = all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    assert same == (active == 4)  # the control: one at a time is something else


def test_a_quadratic_is_solved_block_by_block() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 12)
    matrix = matrix @ matrix.T / 12 + torch.eye(12)
    target = torch.randn(12)
    blocks = [[nn.Parameter(torch.zeros(3))] for _ in range(4)]
    method = BlockDescent(blocks, every=25)
    for step in range(4000):
        method.set_lr(0.05 * 0.999**step)
        away = torch.cat([block[0] for block in blocks]) - target
        (0.5 * away @ matrix @ away).backward()
        method.step()
    assert (torch.cat([block[0].detach() for block in blocks]) - target).abs().max() < 1e-2


def test_each_block_has_its_turn_and_only_it_changes() -> None:
    ours = model()
    method = BlockDescent(blocks_of(ours), every=1)
    turns = []
    for step in range(8):
        (active,), before = method.active, weights(ours)
        train(ours, method, 1)
        assert changed(ours, before) == {name for name in before if f"layers.{active}." in name}, step
        turns.append(active)
    assert sorted(turns[:4]) == sorted(turns[4:]) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_is_of_the_active_block_alone(dtype: torch.dtype) -> None:
    ours = model(dtype)
    blocks = blocks_of(ours)
    method = BlockDescent(blocks, every=2)
    count = sum(weight.numel() for weight in blocks[0])
    copies = 1 if dtype == torch.bfloat16 else 0
    for _ in range(4):
        train(ours, method, 1)
        backward(ours)
        assert driver.size(w.grad for w in ours.parameters() if w.grad is not None) == count * dtype.itemsize
        assert driver.size(method.held()) == count * 4 * (2 + copies)
        method.step()
        assert driver.size(method.held()) == count * 4 * copies  # just after a switch there are no moments


@pytest.mark.parametrize("partial", [False, True])
def test_bread_trains_the_adapters_of_inactive_blocks_and_only_these(partial: bool) -> None:
    ours = bread.with_adapters(model(), rank=2)
    blocks = blocks_of(ours)
    stack = LayerStack.from_model(ours)
    adapters = [[w for name, w in block.named_parameters() if "lora_" in name] for block in stack.layers]
    method = BlockDescent(blocks, every=1, correction=bread.LowRank(adapters, partial))
    for _ in range(3):  # at first the B are zero, and the A have no gradient
        train(ours, method, 1)
    (active,) = method.active
    twin = copy.deepcopy(ours)
    expected = set()
    for name, weight in twin.named_parameters():
        index = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1
        own = "lora_" not in name and index == active
        beside = "lora_" in name and index != active and (index > active or not partial) and index >= 0
        weight.requires_grad_(own or beside)
        expected |= {name} if own or beside else set()
    optimizer = torch.optim.AdamW([w for w in twin.parameters() if w.requires_grad], lr=LR, **ADAMW)
    backward(twin)
    optimizer.step()
    before = weights(ours)
    method.set_lr(LR)
    backward(ours)
    method.step()
    assert changed(ours, before) == expected
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("partial", [False, True])
def test_bread_takes_a_step_of_sgd_on_inactive_blocks_and_keeps_no_gradient(partial: bool) -> None:
    ours = model()
    blocks = blocks_of(ours)
    method = BlockDescent(blocks, every=9, seed=2, correction=bread.Sgd(blocks, partial, scale=5.0))
    (active,) = method.active
    twin = model()
    backward(twin)
    gradients = {name: weight.grad for name, weight in twin.named_parameters()}
    before = weights(ours)
    method.set_lr(LR)
    backward(ours)
    assert {name for name, w in ours.named_parameters() if w.grad is not None} == {
        name for name in before if f"layers.{active}." in name
    }
    method.step()
    for index, block in itertools.product(range(4), [LayerStack.from_model(ours).layers]):
        for name, weight in block[index].named_parameters():
            name = f"model.layers.{index}.{name}"
            if index != active:
                moved = 0.0 if partial and index < active else -5.0 * LR
                assert torch.allclose(weight, before[name] + moved * gradients[name], rtol=0, atol=1e-7), name
            else:
                assert not torch.equal(weight, before[name])
    assert 0 < active < 3  # there are blocks above and below
    outside = {name for name in changed(ours, before) if "layers." not in name}
    assert not outside


def test_without_a_correction_inactive_blocks_stay() -> None:
    """The control of the two before."""
    ours = model()
    method = BlockDescent(blocks_of(ours), every=9, correction=Correction())
    before = weights(ours)
    train(ours, method, 2)
    assert len({name.split(".")[2] for name in changed(ours, before)}) == 1


def test_the_learning_rate_is_that_of_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, 40)
    for step in range(40):
        assert driver.learning_rate(step, 40, 1e-3) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_the_authors_package_trains_one_block_at_a_time() -> None:
    pytest.importorskip(
        "badam", reason="needs the authors' package: pip install --no-deps --target DIR badam; PYTHONPATH=DIR"
    )
    ours = model()
    method = badam.Package(ours, every=3)
    before, turns = weights(ours), []
    for step in range(6):
        method.set_lr(LR)
        backward(ours, step)
        method.step()
        turns.append({name.split(".")[2] for name in changed(ours, before)})
        before = weights(ours)
    assert [len(turn) for turn in turns] == [1] * 6
    assert len(set.union(*turns)) > 1


@pytest.mark.parametrize(
    ("script", "words", "variant"),
    [
        (badam, ["--method", "own"], "block descent"),
        (badam, ["--method", "adamw"], "adamw on all blocks"),
        (bread, ["--dtype", "float32"], "bread low-rank"),
        (bread, ["--correction", "sgd", "--reach", "partial"], "bread sgd, partial"),
    ],
)
def test_a_run_is_recorded(script: Any, words: list[str], variant: str, tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    (tmp_path / "gsm8k").mkdir()
    tiny.write_rows(
        tmp_path / "gsm8k/train.jsonl", lambda i: {"question": f"{i} + {i}?", "answer": f"It is {i + i}."}, 60
    )
    out = tmp_path / "out.jsonl"
    places = ["--out", out, "--data", tmp_path, "--cache", tmp_path / "cache", "--model", tmp_path / "model"]
    script.main([*map(str, places), "--steps", "8", "--every", "2", "--lr", "1e-2", *words])
    found = {record.name: record for record in records.read(out)}
    assert found.keys() == {"peers_loss_select", "peers_loss_verdict", "peers_state", "peers_step"}
    assert {record.variant for record in found.values()} == {variant}
    assert found["peers_step"].n == 7
    if script is badam:  # gradients in bf16, moments and master copies in fp32, of the blocks that are active
        layers = LayerStack.from_model(model()).layers
        sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
        assert found["peers_state"].value == (sum(sizes) if "adamw" in words else max(sizes)) * (2 + 4 + 4 + 4)
    assert found["peers_state"].value > 0
    assert json.loads(out.read_text().splitlines()[0])["settings"]["steps"] == 8
