"""The learning rates that an arm tries where none are given: a grid around the usual value of its method."""

from __future__ import annotations

SMALL = 1_000_000_000
"""Parameters below which a model takes larger learning rates."""

FACTOR = 3.0
"""Between a learning rate and the next."""

USUAL: dict[str, tuple[float, float]] = {
    "full": (1.5e-4, 1e-5),
    "lisa": (1e-3, 5e-5),
    "lora": (1e-3, 2e-4),
    "galore": (1e-3, 5e-5),
}
"""By method, the middle of the grid for a small model and for a large one.

For large ones it is what the methods' authors use for 7B. For small ones, of ``full`` and ``lisa`` it is what was found best on
SmolLM2-135M (docs/ablation.md); of ``lora`` and ``galore``, whose rates nobody has searched there, the one of ``lisa``.
"""


def grid(method: str, parameters: int, tries: int) -> tuple[float, ...] | None:
    """Learning rates at equal distances on a logarithmic scale, ascending; None for a method that is not in :data:`USUAL`.

    Args:
        method: Its name in run files.
        parameters: Of the model; 0 if it is not known, which is taken for large.
        tries: How many.

    Example:
        >>> grid("full", 135_000_000, 3)
        (5e-05, 0.00015, 0.00045)
    """
    if method not in USUAL:
        return None
    small, large = USUAL[method]
    middle = small if 0 < parameters < SMALL else large
    return tuple(float(f"{middle * FACTOR ** (i - (tries - 1) / 2):.2g}") for i in range(tries))
