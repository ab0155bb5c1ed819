"""A module of a model as the planner sees it: kind and shapes; and the widths of a block's tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """One module with parameters of its own."""

    kind: str
    """``embedding``, ``norm``, ``linear``, ``experts`` or ``head``."""

    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its parameters: the weight first, then a bias."""

    width: int = 0
    """Elements per token of its input; 0 for an embedding."""

    part: str = ""
    """``attention`` or ``mlp`` for a linear that tensor parallelism splits."""

    by_row: bool = False
    """Whether tensor parallelism splits a linear by its inputs (row parallel, the second of a pair) instead of its
    outputs."""

    name: str = ""
    """Of a linear, its path within the block, such as ``self_attn.q_proj``; empty for one that adapters and projections leave out."""

    @property
    def numels(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Sizes:
    """Widths of a block's tensors, in elements per token."""

    hidden: int
    query: int
    """Query heads times their dimension."""

    key: int
    """Key-value heads times their dimension; values are as many."""

    intermediate: int
    num_heads: int
    num_key_heads: int
    vocab: int
    gated: bool
    """Whether the MLP multiplies two projections (SwiGLU) instead of one."""

    norm: str
    """``rms`` (computed in fp32 from a copy) or ``layer``."""

    active_experts: int = 1
