"""A small transformer written by hand, whole or with each layer shared by the ranks of a group, in Megatron's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

WIDTH, HEADS, LAYERS, VOCABULARY = 52, 2, 5, 101
COLUMNS = ("q", "k", "v", "up")  # linears whose outputs are shared out
ROWS = ("out", "down")  # linears whose inputs are

Checkpoint = Callable[..., Any]


class Mpu:
    """Groups of ranks, under the names by which Megatron-style scripts give them to ``deepspeed.initialize``."""

    def __init__(self, tensor: int) -> None:
        world = list(range(dist.get_world_size()))
        for start in range(0, len(world), tensor):
            group = dist.new_group(world[start : start + tensor])
            if dist.get_rank() in world[start : start + tensor]:
                self._model = group
        for first in range(tensor):
            group = dist.new_group(world[first::tensor])
            if dist.get_rank() in world[first::tensor]:
                self._data = group

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 74), nn.Linear(74, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.input_layernorm(hidden)
        q, k, v = (
            project(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(mixed)
        result: Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return result


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.checkpoint: Checkpoint | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden) if self.checkpoint is None else self.checkpoint(layer, hidden)
        result: Tensor = self.norm(hidden)
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        logits = self.lm_head(self.body(input_ids))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def build() -> Model:
    """The whole model, the same on every rank."""
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter is model.body.norm.weight else 0.0, std=0.05)
    return model


class _Copy(torch.autograd.Function):
    """Into a shared layer: each rank's part of it adds to the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """Out of a shared layer: the sum of each rank's part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        value = value.contiguous()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class ColumnParallel(nn.Module):
    def __init__(self, whole: nn.Linear, mpu: Mpu) -> None:
        super().__init__()
        self.group = mpu.get_model_parallel_group()
        self.weight, self.bias = (_part(parameter, 0, mpu) for parameter in (whole.weight, whole.bias))

    def forward(self, value: Tensor) -> Tensor:
        return F.linear(_Copy.apply(value, self.group), self.weight, self.bias)


class RowParallel(nn.Module):
    def __init__(self, whole: nn.Linear, mpu: Mpu) -> None:
        super().__init__()
        self.group = mpu.get_model_parallel_group()
        self.weight, self.bias = _part(whole.weight, 1, mpu), whole.bias

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = _Sum.apply(F.linear(value, self.weight), self.group) + self.bias
        return result


def share_(model: Model, mpu: Mpu) -> Model:
    """Leave each rank its part of every layer."""
    for block in model.body.layers:
        for name in COLUMNS:
            setattr(block, name, ColumnParallel(getattr(block, name), mpu))
        for name in ROWS:
            setattr(block, name, RowParallel(getattr(block, name), mpu))
    return model


def whole(parameters: dict[str, Tensor], mpu: Mpu) -> dict[str, Tensor]:
    """Put the parts of each parameter together again; ``parameters`` are this rank's, by name."""
    result = {}
    for name, parameter in parameters.items():
        layer, _, kind = name.rpartition(".")
        layer = layer.rpartition(".")[2]
        dim = 0 if layer in COLUMNS else 1 if layer in ROWS and kind == "weight" else None
        if dim is not None:
            parts = [torch.empty_like(parameter) for _ in range(mpu.get_model_parallel_world_size())]
            dist.all_gather(parts, parameter.contiguous(), group=mpu.get_model_parallel_group())
            parameter = torch.cat(parts, dim)
        result[name] = parameter
    return result


def _part(parameter: Tensor, dim: int, mpu: Mpu) -> nn.Parameter:
    part = parameter.detach().chunk(mpu.get_model_parallel_world_size(), dim)[mpu.get_model_parallel_rank()]
    result = nn.Parameter(part.clone())
    result.tensor_model_parallel = True  # type: ignore[attr-defined]  # Megatron's mark: not a copy
    return result
