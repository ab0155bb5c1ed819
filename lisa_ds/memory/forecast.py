"""Forecasts the peak memory of a run on one rank in each of its phases, before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection

from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.methods import METHODS
from lisa_ds.memory.run_settings import Forecast, RunSettings


def forecast(
    architecture: Architecture,
    run: RunSettings,
    sampled: Collection[int] | None = None,
    roles: Collection[str] | None = None,
) -> Forecast:
    """The peaks of a run.

    It assumes the largest draw, and rows of the full length. It leaves out the device's own context, the communication
    library, and the allocator's fragmentation.

    Args:
        architecture: The model.
        run: Its settings.
        sampled: LISA's blocks, to plan for one draw; None for the one that takes the most.
        roles: Which of embeddings, head and rest train under LISA; None for all that may.

    Raises:
        ConfigError: The method's settings do not fit the model.
    """
    share = architecture.split(run.tensor_parallel)
    return METHODS[run.method].forecast(share, run, whole=architecture, sampled=sampled, roles=roles)
