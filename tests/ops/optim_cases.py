"""A small model for optimizers, a backward pass, and how far two of it are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
