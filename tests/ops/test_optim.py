"""MaskedAdamW alone, in plain torch scripts: torch.optim.AdamW's results, names and habits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_ds import MaskedAdamW
from lisa_ds.optim import StateFormat
from tests.ops.optim_cases import backward, distance, groups, model


def test_it_steps_as_torch_does_with_groups_and_a_schedule() -> None:
    ours, theirs = model(), model()
    optimizers = MaskedAdamW(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
    for step in range(10):
        for network, optimizer, schedule in zip((ours, theirs), optimizers, schedules, strict=True):
            backward(network, step)
            optimizer.step()
            schedule.step()
    assert distance(ours, theirs) < 1e-6


def test_what_has_no_gradient_is_left_alone_and_has_no_state() -> None:
    ours, theirs = model(), model()
    optimizers = MaskedAdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    before = ours[2].weight.detach().clone()
    for step in range(6):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            network[2].requires_grad_(step >= 3)  # its history begins later
            backward(network, step)
            optimizer.step()
        if step == 2:
            assert torch.equal(ours[2].weight, before)
            assert ours[2].weight not in optimizers[0].state
    assert float(optimizers[0].state[ours[0].weight]["step"]) == 6
    assert float(optimizers[0].state[ours[2].weight]["step"]) == 3
    assert distance(ours, theirs) < 1e-6


def test_dropped_state_begins_anew_although_the_tensors_stay_where_they_are() -> None:
    network = model()
    optimizer = MaskedAdamW(network.parameters(), lr=1e-2)
    places: dict[Tensor, Tensor] = {}
    for step in range(3):
        backward(network, step)
        for parameter in network.parameters():  # into the same memory each time
            assert parameter.grad is not None
            parameter.grad = places.setdefault(parameter, torch.empty_like(parameter.grad)).copy_(parameter.grad)
        if step == 2:
            optimizer.state.pop(network[0].weight)
        optimizer.step()
    assert float(optimizer.state[network[0].weight]["step"]) == 1
    assert float(optimizer.state[network[2].weight]["step"]) == 3


def test_a_16_bit_weight_is_its_rounded_master() -> None:
    network = model(torch.bfloat16)
    optimizer = MaskedAdamW(network.parameters(), lr=1e-4)
    for step in range(5):
        backward(network, step)
        optimizer.step()
    for parameter in network.parameters():
        master = optimizer.state[parameter]["master"]
        assert torch.equal(master.bfloat16(), parameter.detach())
        assert not torch.equal(master, parameter.detach().float())


def test_clipping_happens_inside_the_step() -> None:
    ours, theirs = model(), model()
    optimizers = (
        MaskedAdamW(ours.parameters(), lr=1e-2, max_grad_norm=0.05),
        torch.optim.AdamW(theirs.parameters(), lr=1e-2),
    )
    for step in range(4):
        backward(ours, step)
        backward(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        for optimizer in optimizers:
            optimizer.step()
        found = optimizers[0].grad_norm
        assert found is not None
        assert float(found) == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 0.05
    assert distance(ours, theirs) < 1e-6


def test_a_step_whose_norm_is_not_finite_is_not_taken() -> None:
    network = model()
    optimizer = MaskedAdamW(network.parameters(), lr=1e-2, max_grad_norm=1.0)
    backward(network, 0)
    optimizer.step()
    before = [p.detach().clone() for p in network.parameters()]
    assert network[0].weight.grad is not None
    network[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    assert float(optimizer.state[network[0].weight]["step"]) == 1


def test_it_goes_with_a_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours, theirs = model(), model()
    optimizers = MaskedAdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step in range(4):
        backward(theirs, step)
        optimizers[1].step()
        ours.zero_grad()
        rows = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        scaler.scale(ours(rows).square().mean()).backward()
        scaler.step(optimizers[0])
        scaler.update()
    assert distance(ours, theirs) < 1e-6
    before = [p.detach().clone() for p in ours.parameters()]
    scaler.scale(ours(rows).square().mean() * float("inf")).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(ours.parameters(), before, strict=True))
    assert scaler.get_scale() < 1024.0


def test_the_rate_may_be_a_tensor() -> None:
    ours, theirs = model(), model()
    rate = torch.tensor(1e-2)
    optimizers = MaskedAdamW(ours.parameters(), lr=rate), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step in range(3):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            backward(network, step)
            optimizer.step()
    assert distance(ours, theirs) < 1e-6


class FreshAdamW(torch.optim.AdamW):
    """Torch's, which forgets its state before each step."""

    def step(self, *args: Any, **options: Any) -> Any:
        self.state.clear()
        return super().step(*args, **options)


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
def test_without_moments_it_is_a_fresh_adamw_at_each_step(rate: float | Tensor) -> None:
    ours, theirs, kept = model(), model(), model()
    optimizers = (
        MaskedAdamW(ours.parameters(), lr=rate, betas=(0.5, 0.6), eps=1e-4, moments="none", max_grad_norm=0.02),
        FreshAdamW(theirs.parameters(), lr=1e-2, eps=1e-4),
        torch.optim.AdamW(kept.parameters(), lr=1e-2, eps=1e-4),
    )
    for step in range(10):
        for network, optimizer in zip((ours, theirs, kept), optimizers, strict=True):
            backward(network, step)
            if network is not ours:
                assert float(nn.utils.clip_grad_norm_(network.parameters(), 0.02)) > 0.02
            optimizer.step()
    assert distance(ours, theirs) < 1e-6
    assert distance(ours, kept) > 1e-2  # control
    assert all(set(state) == {"step"} for state in optimizers[0].state.values())
    assert float(optimizers[0].state[ours[0].weight]["step"]) == 10


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"maximize": True}], ids=str)
def test_without_moments_a_missing_decay_or_a_wrong_sign_would_be_seen(wrong: dict[str, Any]) -> None:
    """Control: of the comparison above."""
    ours, theirs = model(), model()
    optimizers = (
        MaskedAdamW(ours.parameters(), lr=1e-2, eps=1e-4, moments="none", weight_decay=0.1),
        FreshAdamW(theirs.parameters(), **{"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, **wrong}),
    )
    for network, optimizer in zip((ours, theirs), optimizers, strict=True):
        backward(network, 0)
        optimizer.step()
    assert distance(ours, theirs) > 1e-5


def test_types_may_be_mixed_in_one_optimizer() -> None:
    network = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.LayerNorm(8))
    optimizer = MaskedAdamW(network.parameters(), lr=1e-2, precision="stochastic_rounding", moments="bf16")
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    assert optimizer.state[network[1].weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[network[0].weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "mixd"}, "precision: should be one of mixed, stochastic_rounding, got 'mixd'"),
        ({"moments": "int4"}, "moments: should be one of fp32, bf16, int8, none, got 'int4'"),
        ({"moments": "bf16"}, "goes with precision 'stochastic_rounding'"),
    ],
)
def test_mistakes_are_told_by_name(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(model().parameters(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["mixed", "stochastic_rounding"])
def test_either_precision_goes_without_moments(precision: str) -> None:
    chosen = StateFormat(precision, "none")
    for dtype in (torch.bfloat16, torch.float32):
        assert chosen.moments_of(dtype) == "none"
        state = chosen.new_moments(torch.ones(300, dtype=dtype), sizes=[100, 200])
        assert {key: value.tolist() for key, value in state.items()} == {"step": 0.0}


def test_what_it_cannot_update_is_refused() -> None:
    half = nn.Linear(3, 3).half()
    with pytest.raises(ValueError, match="takes bfloat16 weights, got float16"):
        MaskedAdamW(half.parameters(), precision="stochastic_rounding")
    turned = nn.Parameter(torch.zeros(3, 4).t())
    turned.grad = torch.ones_like(turned)
    with pytest.raises(ValueError, match="parameter 0 of shape \\(4, 3\\) is not contiguous"):
        MaskedAdamW([turned]).step()
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="takes dense gradients"):
        MaskedAdamW(embedding.parameters()).step()


def test_a_gradient_in_another_order_of_memory_is_read_right() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    gradient: Tensor = torch.arange(6.0).view(3, 2).t() - 2.5
    weight.grad = gradient
    MaskedAdamW([weight], lr=1.0, weight_decay=0.0).step()
    assert torch.equal(weight.detach().sign(), -gradient.sign())


def test_formats_compare_by_what_they_say() -> None:
    assert StateFormat() == StateFormat("mixed", "fp32")
    assert StateFormat("mixed", "int8") != StateFormat()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_new_tensors_does_not_matter(dtype: torch.dtype) -> None:
    network = model()
    optimizer = MaskedAdamW(network.parameters(), moments="int8", max_grad_norm=1.0)
    backward(network, 0)
    torch.set_default_dtype(dtype)
    try:
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[network[0].weight]["exp_avg_scale"].dtype == torch.float32
