"""``WindowPlan``: the model's units and the first draw, by which the window is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lisa_ds.engines.common.growth_limit import NormGrowthLimit
from lisa_ds.engines.common.rewarm import Rewarm
from lisa_ds.engines.zero3.state.release import Drop, Release
from lisa_ds.layers import ROLES, Unit


@dataclass(frozen=True)
class WindowPlan:
    """The facts about model and run that the window needs before Stage 3 lays out its buffers."""

    unit_of: Mapping[int, Unit]
    """``id(parameter)`` to its unit, for every parameter of the model."""

    sampled: tuple[int, ...]
    """Blocks of the first interval."""

    lr_scales: Mapping[Unit, float]
    """Learning-rate factor of a unit; units not named train at the optimizer's own rate."""

    roles: tuple[str, ...] = ROLES
    """Roles that train in the first interval."""

    rewarm: Rewarm = field(default_factory=Rewarm)
    """Learning-rate warm-up of units that begin to train at a switch."""

    growth_limit: NormGrowthLimit = field(default_factory=NormGrowthLimit)
    """Norm-growth limiter of the gradients of units."""

    release: Release = field(default_factory=Drop)
    """Policy for the state of units that stop training."""
