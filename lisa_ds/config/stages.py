"""Which stages of ZeRO a method runs under: read by the planner, by the methods themselves and by comparisons."""

from __future__ import annotations

from collections.abc import Mapping

ZERO_STAGES: Mapping[str, tuple[int, ...]] = {"lisa": (3,), "full": (3,), "lora": (3, 2), "galore": ()}
"""By method, the default first; none where it runs without DeepSpeed, so that every rank holds the whole model."""
