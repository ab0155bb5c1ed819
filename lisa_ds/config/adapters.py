"""The ``lisa.adapters`` section: LoRA adapters that train in every interval, beside the units that are drawn."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from lisa_ds.config.base import Section
from lisa_ds.config.targets import ALL_LINEAR, Targets, checked


class AdaptersConfig(Section):
    """Adapters of low rank on every linear train always; what is drawn trains in full rank beneath them."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank r of the update of each matrix."""

    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The update is multiplied by alpha / r; ``null`` for 2 r."""

    targets: Annotated[Targets, BeforeValidator(checked)] = ALL_LINEAR
    """Which linears have adapters, as ``lora.targets``."""

    learning_rate_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """Factor on the learning rate of the adapters, which take about ten times that of whole weights."""

    @property
    def scale_numerator(self) -> float:
        """The alpha that PEFT is given."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def __str__(self) -> str:
        """As it is compared when a run is resumed: what decides shapes, and what the model computes."""
        return f"rank {self.rank}, alpha {self.scale_numerator:g}, on {self.targets}"
