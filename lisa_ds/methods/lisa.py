"""LISA, by its own engine."""

from __future__ import annotations

from typing import Any

from lisa_ds.config import RunConfig
from lisa_ds.engines.common import policies
from lisa_ds.integrations.hf import attach
from lisa_ds.methods.base import Method


class Lisa(Method):
    """Sampled layers train."""

    name = "lisa"

    def check(self, config: RunConfig, model: Any) -> None:
        """See the base class: more layers than there are, policies that contradict each other, no block stack."""
        policies.check(model, config.lisa)

    def prepare(self, trainer: Any, config: RunConfig) -> None:
        """See the base class."""
        attach(trainer, config.lisa)
