"""The planner's view of a model whose matrices are drawn: its shape, and the draws that may take the most memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from lisa_ds.config import LisaConfig
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.state import ModelShape, most_of_a_draw

Trained = Mapping[int, frozenset[int]]
"""By block, which of its modules train; blocks that are left out are frozen."""


@dataclass(frozen=True)
class _Matrix:
    block: int
    module: int
    width: int
    numels: tuple[int, ...]


def shape_of(architecture: Architecture, lisa: LisaConfig) -> ModelShape:
    """The model's shape with the units that ``lisa`` draws."""
    shape = architecture.shape
    if lisa.adapters is not None:
        shape = replace(shape, adapters=tuple(architecture.adapters(lisa.adapters.targets, lisa.adapters.rank)))
    if lisa.unit == "block":
        return shape
    units = [matrix.numels for matrix in _matrices(architecture)]
    small = tuple(n for module in architecture.block if module.kind == "norm" for n in module.numels)
    with_block = lisa.block_rest == "with_block" and small
    return replace(
        shape,
        layers=(*units, *((small,) * architecture.num_layers if with_block else ())),
        block_rest=() if with_block else small * architecture.num_layers,
        of_blocks=architecture.num_layers,
    )


def trained(architecture: Architecture, units: Collection[int]) -> Trained:
    """What trains while ``units`` do, indices of ``layers`` of :func:`shape_of`."""
    matrices = list(_matrices(architecture))
    small = frozenset(i for i, module in enumerate(architecture.block) if module.kind == "norm")
    found: dict[int, frozenset[int]] = {}
    for unit in units:
        block, modules = unit - len(matrices), small
        if unit < len(matrices):
            block, modules = matrices[unit].block, frozenset({matrices[unit].module})
        found[block] = found.get(block, frozenset()) | modules
    return found


def worst(architecture: Architecture, lisa: LisaConfig) -> list[Trained]:
    """Draws that fill the budget: the lowest blocks whole, and those that keep the widest inputs, anywhere in depth.

    With activation checkpointing a block's inputs are kept for itself alone, and the first takes more; without, the second.
    """
    matrices = list(_matrices(architecture))
    budget = most_of_a_draw(shape_of(architecture, lisa), lisa)
    widest = sorted(matrices, key=lambda matrix: (sum(matrix.numels) / matrix.width, matrix.block))
    small = frozenset(i for i, module in enumerate(architecture.block) if module.kind == "norm")
    return [_filled(order, budget, small, lisa) for order in (matrices, widest)]


def _filled(order: list[_Matrix], budget: int, small: frozenset[int], lisa: LisaConfig) -> Trained:
    found: dict[int, set[int]] = {}
    for matrix in order:
        if sum(matrix.numels) <= budget:
            budget -= sum(matrix.numels)
            found.setdefault(matrix.block, set()).add(matrix.module)
    beside = small if lisa.block_rest != "never" else frozenset()
    return {block: frozenset(modules) | beside for block, modules in found.items()}


def _matrices(architecture: Architecture) -> Iterator[_Matrix]:
    for block in range(architecture.num_layers):
        for index, module in enumerate(architecture.block):
            if module.kind == "experts":  # each of its tensors is one
                yield from (_Matrix(block, index, module.width, (numel,)) for numel in module.numels)
            elif module.kind != "norm":
                yield _Matrix(block, index, module.width, module.numels)
