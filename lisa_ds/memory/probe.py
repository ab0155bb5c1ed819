"""Memory of scoring blocks by their gradients on one rank, beside the model and its activations."""

from __future__ import annotations

from collections.abc import Sequence

from lisa_ds.config.formats import SCORING_CHUNK
from lisa_ds.memory.state import ModelShape

_FP32, _FP64 = 4, 8


def probe_bytes(shape: ModelShape, *, kind: str, world_size: int, probe_blocks: int = 1, weight_bytes: int = 2) -> int:
    """Peak bytes on one rank of all tensors that scoring itself holds, gradients included.

    With ``part(n) = ceil(n / N)`` on ``N`` ranks, and weights (hence gradients) of ``w`` bytes, a parameter of ``n`` elements is
    *in flight* with its gradient and, on several ranks, the padded fp32 copy that is reduced: ``w n + 4 N part(n)``.

    - ``accumulated``: an fp32 part of each parameter of the blocks scored together, ``4 sum(part(n))``, and the largest of them
      in flight; the largest such window counts.
    - ``mean``: the largest parameter in flight, and a number in fp64 for each block; or what is left of that parameter once it has
      been reduced, and one number more.
    - ``empirical``: the same on one rank as on several: nothing is reduced.
    - ``hutchinson``: a copy of the weights that are moved, ``w sum(part(n))``, a number for each of their blocks and one more, the
      gradient of the largest, and 16 bytes an element for its signs and products, for at most 2^20 elements at a time.

    Args:
        shape: The model; parameters that never train are not scored.
        kind: One of the above.
        world_size: Ranks that share the state.
        probe_blocks: Blocks scored together, by ``accumulated`` and ``hutchinson``.
        weight_bytes: 2 for bf16 and fp16 weights, 4 for fp32.

    Raises:
        ValueError: There is no such kind.

    Example:
        >>> shape = ModelShape(layers=((10, 7), (10, 7)))
        >>> probe_bytes(shape, kind="accumulated", world_size=2)  # 4 (5 + 4), and 2 * 10 + 4 * 10 in flight
        96
    """
    layers = shape.layers
    if kind == "accumulated":
        return max(
            _FP32 * _parts(window, world_size) + max(_in_flight(n, world_size, weight_bytes) for n in _flat(window))
            for window in _windows(layers, probe_blocks)
        )
    if kind in ("mean", "empirical"):
        ranks = world_size if kind == "mean" else 1
        return _FP64 * len(layers) + max(
            max(_in_flight(n, ranks, weight_bytes), _reduced(n, ranks, weight_bytes) + _FP64) for n in _flat(layers)
        )
    if kind == "hutchinson":
        return max(
            weight_bytes * _parts(window, world_size)
            + _FP64 * (len(window) + 1)
            + max(weight_bytes * n + 2 * _FP64 * min(n, SCORING_CHUNK) for n in _flat(window))
            for window in _windows(layers, probe_blocks)
        )
    raise ValueError(f"kind: got {kind!r}; expected accumulated, mean, empirical or hutchinson")


def _windows(layers: Sequence[tuple[int, ...]], probe_blocks: int) -> list[Sequence[tuple[int, ...]]]:
    return [layers[i : i + probe_blocks] for i in range(0, len(layers), probe_blocks)]


def _flat(layers: Sequence[tuple[int, ...]]) -> list[int]:
    return [numel for layer in layers for numel in layer] or [0]


def _parts(layers: Sequence[tuple[int, ...]], world_size: int) -> int:
    return sum(-(-numel // world_size) for numel in _flat(layers))


def _in_flight(numel: int, world_size: int, weight_bytes: int) -> int:
    copy = _reduced(numel, world_size, weight_bytes) if world_size > 1 else 0
    return weight_bytes * numel + copy


def _reduced(numel: int, world_size: int, weight_bytes: int) -> int:
    """Bytes of the padded copy of a gradient, a part of which holds the reduced one; one rank needs none."""
    return _FP32 * world_size * -(-numel // world_size) if world_size > 1 else weight_bytes * numel
