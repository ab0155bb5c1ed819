"""Matrices of models of many architectures: which they are, with which biases, and what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lisa_ds.config import LisaConfig
from lisa_ds.errors import ModelError
from lisa_ds.layers import LayerStack
from tests.models import causal_models


def stack_of(kind: str, **config: Any) -> LayerStack:
    return LayerStack.of_run(causal_models.build(kind, vocab_size=64), LisaConfig.load({"unit": "matrix", **config}))


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("llama", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("gpt_neox", ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
        ("phi3", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    ],
)  # fmt: skip
def test_each_projection_is_a_unit(kind: str, first: list[str]) -> None:
    stack = stack_of(kind)
    of_first = [unit for unit in stack.units if unit.block == 0]
    path = stack.paths[0]
    assert [unit.name for unit in of_first] == [f"{path}.0.{name}" for name in first]
    assert len(stack.units) == len(first) * len(stack.layers)
    assert stack.by_matrices


@pytest.mark.parametrize("small", ["always", "never", "with_block"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox", "opt", "bloom", "gemma2", "mixtral", "phi3"])
def test_every_parameter_is_in_one_unit(kind: str, small: str) -> None:
    stack = stack_of(kind, block_rest=small)
    every = [p for layer in stack.layers for p in layer.parameters()]
    found = [p for unit in stack.units for p in unit.parameters] + stack.block_rest
    assert sorted(map(id, found)) == sorted(map(id, every))
    for index, unit in enumerate(stack.units):
        assert {stack.unit_of[id(p)] for p in unit.parameters} == {index}
        assert {id(p) for p in unit.parameters} <= {id(p) for p in stack.layers[unit.block].parameters()}
        if not unit.follows:
            (weight,) = [p for p in unit.parameters if p.dim() > 1]
            assert all(p.shape[-1] == weight.shape[0] or p.shape[0] in weight.shape for p in unit.parameters)
    following = [unit for unit in stack.units if unit.follows]
    assert len(following) == (len(stack.layers) if small == "with_block" else 0)
    assert (stack.block_rest == []) == (small == "with_block")
    assert all(p.dim() == 1 for p in stack.block_rest)
    assert stack.numels().keys() == set(stack.all_units)


def test_experts_are_units_by_tensor() -> None:
    names = [unit.name for unit in stack_of("mixtral").units if unit.block == 0]
    assert sum("experts" in name for name in names) == 2  # gate and up of all in one tensor, down in another
    assert sum("gate" in name and "experts" not in name for name in names) == 1  # the router


def test_roles_stay_as_they_are() -> None:
    model = causal_models.build("llama", vocab_size=64)
    whole, matrices = LayerStack.from_model(model), LayerStack.of_run(model, LisaConfig.load({"unit": "matrix"}))
    for role in ("embeddings", "lm_head", "rest"):
        assert whole.parameters(role) == matrices.parameters(role)
    assert [unit.block for unit in whole.units] == list(range(len(whole.layers)))


def test_what_is_told_of_matrices() -> None:
    stack = stack_of("llama")
    assert stack.told([0]) == "1 matrices (model.layers.0.self_attn.q_proj)"
    assert stack.told([0, 1, 2]) == "3 matrices (model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, ...)"


def test_blocks_without_a_matrix_are_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    model = nn.Sequential()
    model.blocks = nn.ModuleList([Scale(), Scale()])
    with pytest.raises(ModelError, match="'matrix': no block has a parameter of two dimensions or more; use 'block'"):
        LayerStack.of_run(model, LisaConfig.load({"unit": "matrix"}))
