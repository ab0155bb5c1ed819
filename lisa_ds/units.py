"""What is drawn of a model: whole blocks, or single matrices anywhere in depth.

A *matrix* is a parameter of a block with two dimensions or more (the weight of a linear or a convolution, fused projections,
all experts in one tensor), together with the bias beside it. What is left of a block is small: norms, gates, biases of other
modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn


@dataclass(frozen=True, eq=False)
class Drawn:
    """A unit of the draw."""

    name: str
    """The path of its block or of its matrix's module in the model, such as ``model.layers.3.mlp.up_proj``."""

    block: int
    """The block that it is, or is in."""

    parameters: tuple[nn.Parameter, ...]

    follows: bool = False
    """Whether it is not drawn itself, but trains whenever another unit of its block does."""


def numel(parameter: nn.Parameter) -> int:
    """Elements of a whole parameter: what a rank holds of a partitioned one is empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def matrices(
    blocks: Sequence[nn.Module], names: Sequence[str], apart: Collection[int] = ()
) -> tuple[list[Drawn], list[Drawn]]:
    """The matrices of ``blocks``, in the order in which blocks name them, and of each block its small parameters, if any.

    Args:
        blocks: The blocks of a model.
        names: The path of each.
        apart: ``id`` of each parameter that is left out.
    """
    found: list[Drawn] = []
    small: list[Drawn] = []
    for index, (block, path) in enumerate(zip(blocks, names, strict=True)):
        left: list[nn.Parameter] = []
        for name, parts, others in _by_module(block, apart):
            place = f"{path}.{name}".removesuffix(".").removesuffix(
                ".base_layer"
            )  # PEFT's name of a linear beside an adapter
            found += [Drawn(place, index, tuple(part)) for part in parts]
            left += others
        if left:
            small.append(Drawn(f"{path} (norms and other small parameters)", index, tuple(left), follows=True))
    return found, small


def _by_module(
    block: nn.Module, apart: Collection[int]
) -> Iterator[tuple[str, list[list[nn.Parameter]], list[nn.Parameter]]]:
    """Each module of ``block``, with its matrices (each with its bias) and its other parameters; no parameter twice."""
    seen = set(apart)
    for name, module in block.named_modules():
        mine = [(key, p) for key, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen.update(id(parameter) for _, parameter in mine)
        large = {key: [p] for key, p in mine if _dimensions(p) > 1}
        small: list[nn.Parameter] = []
        for key, parameter in mine:
            if key in large:
                continue
            # `bias` beside `weight`; `up_proj_bias` beside `up_proj`.
            owner = next((other for other in large if key == "bias" or key == f"{other}_bias"), None)
            (large[owner] if owner else small).append(parameter)
        yield name, list(large.values()), small


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def assigned(units: Sequence[Drawn]) -> dict[int, int]:
    """``id(parameter)`` to the index of its unit."""
    return dict(chain.from_iterable(((id(p), i) for p in unit.parameters) for i, unit in enumerate(units)))
