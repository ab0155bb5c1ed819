"""Full fine-tuning: every parameter trains all the time, under stock ZeRO-3."""

from __future__ import annotations

from collections.abc import Collection

from lisa_ds.config.roles import ROLES
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.methods.base import UnderZero3
from lisa_ds.memory.residents import Residents, by_part, residents
from lisa_ds.memory.run_settings import RunSettings
from lisa_ds.memory.state import ModelShape, Precision, full_state_bytes


class Full(UnderZero3):
    """Every parameter trains."""

    name = "full"
    title = "full"

    def residents(
        self,
        architecture: Architecture,
        run: RunSettings,
        sampled: Collection[int] | None = None,
        roles: Collection[str] | None = None,
    ) -> Residents:
        """See the base class."""
        shape = architecture.shape
        state = by_part(_state(shape, run))
        return residents(shape, run, state, trained=shape.all(), blocks=range(len(shape.layers)), roles=ROLES)

    def least(self, shape: ModelShape, run: RunSettings) -> int:
        """All of the model state."""
        return sum(_state(shape, run).values())


def _state(shape: ModelShape, run: RunSettings) -> dict[str, int]:
    return full_state_bytes(shape, world_size=run.world_size, precision=Precision(run.width, run.gradient_width))
