"""Applies ``method`` of a run file (LISA or full fine-tuning) to a trainer; everything else stays equal."""

from __future__ import annotations

from typing import Any

from lisa_ds.config import RunConfig
from lisa_ds.engines.common import policies
from lisa_ds.integrations.hf import attach


def check(config: RunConfig, model: Any) -> None:
    """Refuse a method that does not fit the model, before its weights or any data are read.

    Args:
        config: The run.
        model: Its model, without weights.

    Raises:
        ConfigError: More layers are to be sampled than there are, or policies contradict each other.
        ModelError: The model has no block stack.
    """
    if config.method == "lisa":
        policies.check(model, config.lisa)


def prepare(trainer: Any, config: RunConfig) -> None:
    """Make ``trainer`` train by ``config.method``: ``lisa``, or ``full`` for stock ZeRO-3.

    Raises:
        EngineError: The trainer does not run under ZeRO-3.
    """
    if config.method == "lisa":
        attach(trainer, config.lisa)
