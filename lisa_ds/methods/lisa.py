"""LISA, by its own engine."""

from __future__ import annotations

import copy
from typing import Any

from lisa_ds.config import RunConfig
from lisa_ds.engines.common import policies
from lisa_ds.errors import ConfigError
from lisa_ds.integrations.hf import attach
from lisa_ds.methods.base import Method
from lisa_ds.models.adapters import add_adapters


class Lisa(Method):
    """Sampled layers train."""

    name = "lisa"

    def check(self, config: RunConfig, model: Any) -> None:
        """See the base class: more layers than there are, policies that contradict each other, no block stack."""
        if config.lisa.adapters is not None:
            if config.tensor_parallel() != 1:
                raise ConfigError(
                    f"{config.where('lisa.adapters')}: AutoTP splits linears and knows no adapters (deepspeed "
                    "tensor_parallel.autotp_size); remove one of the two"
                )
            model = add_adapters(copy.deepcopy(model), config.lisa)
        policies.check(model, config.lisa)

    def wrap(self, config: RunConfig, model: Any, seed: int) -> Any:
        """See the base class."""
        return model if config.lisa.adapters is None else add_adapters(model, config.lisa, seed=seed)

    def prepare(self, trainer: Any, config: RunConfig) -> None:
        """See the base class."""
        attach(trainer, config.lisa)
