"""The arithmetic of scores: from what was collected from gradients, or from weight norms, to a number for each block.

An engine runs the calibration data, collects gradients and reduces over ranks; this module does not communicate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lisa_ds.config.formats import SCORING_CHUNK as CHUNK
from lisa_ds.config.sampler_kinds import PROBES
from lisa_ds.errors import EngineError
from lisa_ds.layers import Unit

EPSILON = {torch.float32: 1e-4, torch.bfloat16: 3e-3, torch.float16: 1e-3}
"""Default size of the finite difference by which ``hutchinson`` moves weights, by type."""


def passes(num_layers: int, kind: str, probe_blocks: int) -> list[range]:
    """The blocks of each pass over the data: all, or ``probe_blocks`` at a time for kinds that keep sums or copies.

    Raises:
        EngineError: There is no such kind.
    """
    if kind not in PROBES:
        raise EngineError(f"probe: there is no kind {kind!r}; use one of {', '.join(PROBES)}")
    every = range(num_layers)
    if kind in ("mean", "empirical"):
        return [every]
    return [every[i : i + probe_blocks] for i in every[::probe_blocks]]


# ---- of what was collected -------------------------------------------------------------------------------------------


def add_squares(values: Tensor, total: Tensor) -> None:
    """Add the squares of ``values`` ``(n,)`` to ``total`` ``()``, in fp64, a :data:`~lisa_ds.config.formats.SCORING_CHUNK` at a time."""
    for start in range(0, values.numel(), CHUNK):
        total.add_(torch.linalg.vector_norm(values[start : start + CHUNK], dtype=torch.float64).square_())


def summed_norms(squares: Tensor, sizes: Iterable[int], ranks: int) -> list[float]:
    """For each block, the sum over its parameters of the 2-norm of the gradient, averaged over ranks.

    Args:
        squares: ``(parameters,)``, fp64: of the gradient summed over ranks, block by block.
        sizes: Parameters of each block.
        ranks: How many ranks' gradients were summed.
    """
    norms = iter((squares.sqrt() / ranks).tolist())
    return [sum(itertools.islice(norms, size)) for size in sizes]


def mean_norms(squares: Tensor, ranks: int) -> list[float]:
    """For each block, the mean over batches of the 2-norm of its gradient, averaged over ranks.

    Args:
        squares: ``(batches, blocks)``, fp64: of the gradient summed over ranks.
        ranks: How many ranks' gradients were summed.
    """
    norms: list[float] = (squares.sqrt() / ranks).mean(0).tolist()
    return norms


def means(totals: Tensor, batches: int, ranks: int) -> list[float]:
    """For each block, ``totals`` ``(blocks,)`` over all losses of all ranks, divided by the number of losses."""
    found: list[float] = (totals / (batches * ranks)).tolist()
    return found


def curvatures(above: Sequence[float], below: Sequence[float], epsilon: float) -> list[float]:
    """For each block ``v^T H v``: central difference of slopes along ``v`` at weights moved by ``+-epsilon * v``."""
    return [(first - second) / (2 * epsilon) for first, second in zip(above, below, strict=True)]


# ---- of all blocks ---------------------------------------------------------------------------------------------------


def of_weights(norms: Mapping[Unit, float], num_layers: int) -> list[float]:
    """The scores of sampler ``weight_norm``: the norms of the blocks, out of norms by unit."""
    return [norms[layer] for layer in range(num_layers)]


def check_finite(scores: Sequence[float], kind: str) -> None:
    """Refuse scores that are not finite.

    Raises:
        EngineError: Names the layers.
    """
    finite = torch.tensor(scores, dtype=torch.float64).isfinite().tolist()
    if bad := [block for block, is_number in enumerate(finite) if not is_number]:
        raise EngineError(
            f"the scores ({kind}) of layers {bad} are not finite: gradients overflow on the calibration data; score in bf16 or "
            "fp32, or leave out batches without labels"
        )


def drawable(scores: Iterable[float]) -> list[float]:
    """The scores for a sampler: 0 instead of negative ones, which an estimated trace of a Hessian may have."""
    return [max(0.0, score) for score in scores]
