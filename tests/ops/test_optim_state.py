"""The state of MaskedAdamW: saved, read, in every format, replaced, copied, and no longer alive than needed."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lisa_ds import MaskedAdamW
from tests.ops.optim_cases import backward, distance, model


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
    ("mixed", "none"),
    ("stochastic_rounding", "none"),
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
    each = {"fp32": 8, "bf16": 4, "int8": 2, "none": 0}[moments] + (4 if precision == "mixed" else 0)
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


@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_moments_are_dropped_where_none_are_kept_and_begin_anew_where_there_were_none(moments: str) -> None:
    network = model(torch.bfloat16)
    first = MaskedAdamW(network.parameters(), lr=1e-2, moments=moments)
    for step in range(3):
        backward(network, step)
        first.step()
    without = MaskedAdamW(network.parameters(), lr=1e-2, moments="none")
    without.load_state_dict(first.state_dict())
    for parameter in network.parameters():
        kept = without.state[parameter]
        assert set(kept) == {"step", "master"}
        assert float(kept["step"]) == 3
        assert torch.equal(kept["master"], first.state[parameter]["master"])
    again = MaskedAdamW(network.parameters(), lr=1e-2, moments=moments)
    again.load_state_dict(pickle.loads(pickle.dumps(without.state_dict())))
    fresh_network = copy.deepcopy(network)
    fresh = MaskedAdamW(fresh_network.parameters(), lr=1e-2, moments=moments)
    for parameter, twin in zip(network.parameters(), fresh_network.parameters(), strict=True):
        read = again.state[parameter]
        assert float(read["step"]) == 0  # a count of 3 would leave zero moments uncorrected
        assert not read["exp_avg"].any()
        fresh.state[twin] = {**fresh.format.new_moments(twin), "master": read["master"].clone()}
    for each, by in ((network, again), (fresh_network, fresh)):
        backward(each, 7)
        by.step()
    assert distance(network, fresh_network) == 0


def test_state_that_has_other_things_than_moments_is_not_taken_for_one_without() -> None:
    network = model()
    other = torch.optim.Adagrad(network.parameters())  # step and sum
    backward(network, 0)
    other.step()
    with pytest.raises(KeyError, match="exp_avg"):
        MaskedAdamW(network.parameters()).load_state_dict(other.state_dict())


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
