"""Full fine-tuning: every layer trains all the time, under stock ZeRO-3."""

from __future__ import annotations

from lisa_ds.methods.base import Method


class Full(Method):
    """Every parameter trains."""

    name = "full"
