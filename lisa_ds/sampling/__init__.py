"""The sampler of a run: its config and its model's number of blocks, turned into a schedule."""

from __future__ import annotations

import hashlib

from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError
from lisa_ds.sampling.schedule import draw

__all__ = ["LayerSampler", "draw", "resolve_interval_steps"]


class LayerSampler:
    """Says which blocks train when. It keeps no state: any interval may be asked for, in any order.

    Args:
        num_layers: Number of blocks of the model.
        config: The ``lisa`` section of a run.
        interval_steps: Optimizer steps of an interval, from :func:`resolve_interval_steps`; may be left out
            where ``config.interval_steps`` is a number of steps.

    Raises:
        ConfigError: The config asks for more blocks than the model has, or for none; or it counts in epochs,
            and ``interval_steps`` is left out.

    Example:
        >>> sampler = LayerSampler(32, LisaConfig(num_sampled_layers=2, interval_steps=20))
        >>> sampler.layers_at(0) == sampler.layers_at(sampler.interval_at(step=19))
        True
    """

    def __init__(self, num_layers: int, config: LisaConfig, interval_steps: int | None = None) -> None:
        self.num_layers = num_layers
        """Number of blocks to choose from."""
        self.config = config
        """The ``lisa`` section."""
        self.num_sampled = config.num_sampled(num_layers)
        """Blocks in a draw; for ``bernoulli`` their expected number."""
        self.interval_steps = resolve_interval_steps(config, None) if interval_steps is None else interval_steps
        """Optimizer steps of an interval; neither micro-steps nor skipped steps count."""
        if self.interval_steps < 1:
            raise ConfigError(f"{config.where('interval_steps')}: should be 1 or more, got {interval_steps}")

    def interval_at(self, step: int) -> int:
        """Return the index of the interval that optimizer step ``step`` (from 0) falls in."""
        return step // self.interval_steps

    def layers_at(self, interval: int) -> tuple[int, ...]:
        """Return the blocks that train in ``interval`` (from 0), ascending."""
        return draw(
            self.config.sampler.name,
            seed=self.config.seed,
            interval=interval,
            num_layers=self.num_layers,
            num_sampled=self.num_sampled,
            layers=self.config.sampler.layers,
        )

    def hash_at(self, interval: int) -> int:
        """Return 63 bits on which two ranks, or a checkpoint and the run that resumes it, can compare schedules."""
        facts = (self.num_layers, self.interval_steps, interval, self.layers_at(interval))
        return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1  # fits an int64 tensor


def resolve_interval_steps(config: LisaConfig, steps_per_epoch: int | None) -> int:
    """Return the optimizer steps of an interval, also where the config counts in epochs.

    Args:
        config: The ``lisa`` section.
        steps_per_epoch: Optimizer steps of an epoch; ``None`` where nobody knows it.

    Raises:
        ConfigError: The config counts in epochs, and the length of an epoch is unknown.
    """
    epochs = config.interval_epochs
    if epochs is None:
        return int(config.interval_steps)
    if steps_per_epoch is None or steps_per_epoch < 1:
        raise ConfigError(
            f"{config.where('interval_steps')}: the steps of an epoch are not known here, "
            f"got {config.interval_steps!r}; give a number of optimizer steps"
        )
    return epochs * steps_per_epoch
