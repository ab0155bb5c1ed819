"""Drops references to a destroyed engine that DeepSpeed would keep until the process ends."""

from __future__ import annotations

import inspect
from typing import Any

from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn


def let_go_of(module: nn.Module) -> None:
    """Drop the process's references to the model of a destroyed engine, whose hooks lead to the engine and all its state.

    There are two: the list of modules in forward, which begins with the model of every engine ever built; and the cache
    of parameters to release after each module, one dict for all engines, with coordinators and modules as keys.

    The cache is cleared for all engines, and an entry made anew depends on when it is made. So all ranks must call this at
    the same point of the program: else they release, and then gather, different parameters of an engine that is in use.
    """
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    cached: Any = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    if inspect.isfunction(cached):
        # Behind a decorator that does not name what it wraps.
        cached = inspect.getclosurevars(cached).nonlocals.get("func", cached)
    if hasattr(cached, "cache_clear"):
        cached.cache_clear()
