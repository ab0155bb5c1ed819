"""One switch between the ways to fine-tune, so that they can be compared with everything else equal."""

from __future__ import annotations

from typing import Any

from lisa_ds.config import RunConfig
from lisa_ds.integrations.hf import attach


def prepare(trainer: Any, config: RunConfig) -> None:
    """Make ``trainer`` train by ``config.method``: ``lisa``, or ``full`` for stock ZeRO-3.

    Raises:
        EngineError: The trainer does not run under ZeRO-3.
    """
    if config.method == "lisa":
        attach(trainer, config.lisa)
