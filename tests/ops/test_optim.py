"""MaskedAdamW alone, in plain torch scripts: torch.optim.AdamW's results, names and habits."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_ds import MaskedAdamW
from lisa_ds.optim import StateFormat


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 300)).to(dtype)


def backward(network: nn.Module, step: int) -> None:
    network.zero_grad()
    rows = torch.randn(8, 20, generator=torch.Generator().manual_seed(step)).to(next(network.parameters()).dtype)
    network(rows).float().square().mean().backward()


def groups(network: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


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


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "ours to ours"])
def test_state_goes_there_and_back_under_torchs_names(direction: str) -> None:
    kinds = {"ours": MaskedAdamW, "torch": torch.optim.AdamW}
    first, second = direction.split(" to ")
    networks = model(), model()
    saving, reading = kinds[first](networks[0].parameters(), lr=1e-2), kinds[second](networks[1].parameters(), lr=1e-2)
    for step in range(3):
        backward(networks[0], step)
        saving.step()
    state = pickle.loads(pickle.dumps(saving.state_dict()))
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    networks[1].load_state_dict(networks[0].state_dict())
    reading.load_state_dict(state)
    for step in range(3, 6):
        for network, optimizer in zip(networks, (saving, reading), strict=True):
            backward(network, step)
            optimizer.step()
    assert distance(*networks) < 1e-6


FORMATS = [
    ("mixed", "fp32"),
    ("mixed", "int8"),
    ("stochastic_rounding", "fp32"),
    ("stochastic_rounding", "bf16"),
    ("stochastic_rounding", "int8"),
]


@pytest.mark.parametrize(("precision", "moments"), FORMATS)
def test_a_resumed_run_is_the_same_to_the_bit(precision: str, moments: str) -> None:
    def build() -> tuple[nn.Module, MaskedAdamW]:
        network = model(torch.bfloat16)
        return network, MaskedAdamW(network.parameters(), lr=1e-2, precision=precision, moments=moments, seed=3)

    network, optimizer = build()
    for step in range(3):
        backward(network, step)
        optimizer.step()
    weights, state = copy.deepcopy(network.state_dict()), pickle.loads(pickle.dumps(optimizer.state_dict()))
    resumed, other = build()
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for step in range(3, 6):
        for each, by in ((network, optimizer), (resumed, other)):
            backward(each, step)
            by.step()
    assert distance(network, resumed) == 0
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert set(a) == set(b)
        assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("precision", "moments"), FORMATS)
def test_bytes_of_state_are_those_of_the_format(precision: str, moments: str) -> None:
    network = model(torch.bfloat16)
    optimizer = MaskedAdamW(network.parameters(), precision=precision, moments=moments)
    backward(network, 0)
    optimizer.step()
    numels = [p.numel() for p in network.parameters()]
    scales = sum(-(-numel // 256) for numel in numels)
    each = {"fp32": 8, "bf16": 4, "int8": 2}[moments] + (4 if precision == "mixed" else 0)
    expected = each * sum(numels) + (8 * scales if moments == "int8" else 0) + 4 * len(numels)
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    assert held == expected


def test_moments_of_one_format_are_read_into_another() -> None:
    network = model(torch.bfloat16)
    first = MaskedAdamW(network.parameters(), lr=1e-2)
    for step in range(5):
        backward(network, step)
        first.step()
    exact = first.state[network[2].weight]["exp_avg"]
    second = MaskedAdamW(network.parameters(), moments="int8")
    second.load_state_dict(first.state_dict())
    third = MaskedAdamW(network.parameters())
    third.load_state_dict(second.state_dict())
    assert second.state[network[2].weight]["exp_avg"].dtype == torch.int8
    read = third.state[network[2].weight]["exp_avg"]
    assert read.dtype == torch.float32
    assert float((read - exact).abs().max()) < 0.01 * float(exact.abs().max())
    assert torch.equal(third.state[network[2].weight]["master"], first.state[network[2].weight]["master"])


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
        ({"moments": "int4"}, "moments: should be one of fp32, bf16, int8, got 'int4'"),
        ({"moments": "bf16"}, "goes with precision 'stochastic_rounding'"),
    ],
)
def test_mistakes_are_told_by_name(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(model().parameters(), **arguments)  # type: ignore[arg-type]


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


def test_gradients_of_the_last_step_are_not_kept_alive() -> None:
    """Backward would have to allocate a second set of them, and tables would be built anew at each step."""
    network = model()
    optimizer = MaskedAdamW(network.parameters())
    for step in range(3):
        backward(network, step)
        gradients = [weakref.ref(p.grad.untyped_storage()) for p in network.parameters() if p.grad is not None]
        optimizer.step()
        network.zero_grad()
        assert all(gradient() is None for gradient in gradients)
    assert len(optimizer._launches) == 1


def test_replaced_state_is_what_is_used() -> None:
    network = model()
    optimizer = MaskedAdamW(network.parameters())
    backward(network, 0)
    optimizer.step()
    optimizer.state[network[0].weight]["step"] = torch.tensor(10.0)
    backward(network, 1)
    optimizer.step()
    assert float(optimizer.state[network[0].weight]["step"]) == 11


def test_state_without_a_master_copy_takes_the_weight_as_it_is_at_the_next_step() -> None:
    theirs = model(torch.bfloat16)
    other = torch.optim.AdamW(theirs.parameters())
    backward(theirs, 0)
    other.step()
    network = model(torch.bfloat16)
    optimizer = MaskedAdamW(network.parameters(), lr=1e-3)
    optimizer.load_state_dict(other.state_dict())
    with torch.no_grad():
        network[2].bias.fill_(50.0)
    backward(network, 1)
    optimizer.step()
    assert float(network[2].bias.detach().float().mean()) == pytest.approx(50.0, abs=0.5)


def test_a_model_made_16_bit_later_gets_its_master_copies() -> None:
    network = model()
    optimizer = MaskedAdamW(network.parameters())
    backward(network, 0)
    optimizer.step()
    network.bfloat16()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all("master" in optimizer.state[p] for p in network.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_it_can_be_copied_and_pickled(duplicate: Any) -> None:
    network = model()
    optimizer = MaskedAdamW(network.parameters(), lr=1e-2, max_grad_norm=1.0)
    backward(network, 0)
    optimizer.step()
    other_network, other = duplicate((network, optimizer))
    for each, by in ((network, optimizer), (other_network, other)):
        backward(each, 1)
        by.step()
    assert distance(network, other_network) == 0


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
