"""Tiny models, of transformers and of plain torch, and the rule that their units hold every parameter once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from lisa_ds.layers import ROLES, LayerStack

TINY = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16},
    **{"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


@dataclass
class Case:
    """One architecture, tiny and random, and how it should come apart."""

    config: str
    blocks: str
    tied: bool = False
    options: dict[str, Any] | None = None
    auto: str = "AutoModelForCausalLM"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    lm_head: tuple[str, ...] = ("lm_head.weight",)
    lengths: tuple[int, ...] = (3,)

    @property
    def id(self) -> str:
        return f"{self.config.removesuffix('Config')}-{self.auto.removeprefix('AutoModelFor')}"

    def build(self) -> nn.Module:
        config = getattr(transformers, self.config)(**{**TINY, **(self.options or {})})
        return getattr(transformers, self.auto).from_config(config)


def names(stack: LayerStack, role: str) -> list[str]:
    return [stack.names[id(parameter)] for parameter in stack.parameters(role)]


def assert_every_parameter_is_in_one_unit(model: nn.Module, stack: LayerStack) -> None:
    units = [*range(len(stack.layers)), *ROLES]
    taken = [(id(parameter), unit) for unit in units for parameter in stack.parameters(unit)]
    assert sorted(key for key, _ in taken) == sorted(id(parameter) for parameter in model.parameters())
    assert dict(taken) == stack.unit_of
    assert stack.numels() == {unit: tuple(p.numel() for p in stack.parameters(unit)) for unit in units}


class Block(nn.Module):
    """A residual block with a mixture of experts, kept in a list as transformers 4 did."""

    def __init__(self, width: int = 4, experts: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))


class Plain(nn.Module):
    """A model without a config, without accessors, and with whatever modules a test gives it."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def blocks(count: int = 3, **options: int) -> nn.ModuleList:
    return nn.ModuleList(Block(**options) for _ in range(count))
