"""What all figures have in common: colours, markers, stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of lines: told apart by those who see few colours (Okabe and Ito), and by marker and dash in print."""

COLOURS_ON_ANY = (*COLOURS[:-1], "#7F7F7F")
"""The same on a page that may be light or dark."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

PARTS = {
    "weights": "#5b6b8c",
    "gradients": "#bf616a",
    "master": "#d08770",
    "moments": "#ebcb8b",
    "exp_avg": "#ebcb8b",
    "exp_avg_sq": "#c9a227",
    "buckets": "#a3be8c",
    "parked_host": "#88c0d0",
    "parked_nvme": "#b48ead",
    "gathered": "#8fbcbb",
    "prefetched": "#88c0d0",
    "activations": "#81a1c1",
    "logits": "#5e81ac",
    "gradients in flight": "#b48ead",
    "scratch": "#d8dee9",
}
"""Parts of memory, planned and measured, each with its colour, in the order in which they are stacked."""

PHASES = {
    "forward": "#5e81ac",
    "backward": "#81a1c1",
    "optimizer": "#d08770",
    "switch": "#a3be8c",
    "other": "#b8bec9",
}
"""Phases of a step, each with its colour."""


def line(i: int) -> dict[str, Any]:
    """Colour, marker and dash of the line with a number."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def plain(axes: Any) -> None:
    """Draw no frame but the two axes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def stack(axes: Any, left: Sequence[float], sizes: Sequence[float], label: str, colour: str) -> list[float]:
    """Add a part to bars from the left, one below the other; returns where they end now."""
    if any(sizes):
        axes.barh(range(len(sizes)), sizes, 0.62, left=left, label=label, color=colour)
    return [at + size for at, size in zip(left, sizes, strict=True)]
