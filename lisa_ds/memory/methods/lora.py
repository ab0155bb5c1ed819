"""LoRA: frozen weights, and adapters on every linear of the blocks, under stock ZeRO-3."""

from __future__ import annotations

from collections.abc import Collection

from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.methods.base import UnderZero3
from lisa_ds.memory.residents import Residents, residents
from lisa_ds.memory.run_settings import RunSettings
from lisa_ds.memory.state import partitions


class Lora(UnderZero3):
    """Adapters that train in the model's type, with an fp32 master copy."""

    name = "lora"
    title = "LoRA"

    def residents(
        self,
        architecture: Architecture,
        run: RunSettings,
        sampled: Collection[int] | None = None,
        roles: Collection[str] | None = None,
    ) -> Residents:
        """See the base class."""
        matrices = adapters(architecture, run.lora_rank)
        trained = sum(partitions(matrices, run.world_size))
        frozen = sum(partitions(architecture.shape.all(), run.world_size))
        state = {
            "weights": run.width * (frozen + trained),
            "gradients": run.gradient_width * trained,
            "master": 4 * trained,
            "moments": 8 * trained,
        }
        return residents(architecture.shape, run, state, trained=matrices, blocks=(), roles=())

    def adapter_rank(self, run: RunSettings) -> int:
        """See the base class."""
        return run.lora_rank

    def notes(self, run: RunSettings) -> list[str]:
        """See the base class."""
        return [f"LoRA: rank {run.lora_rank} on every linear of the blocks, with an fp32 master copy of the adapters"]


def adapters(architecture: Architecture, rank: int) -> list[int]:
    """Elements of each matrix of adapters on every linear of the blocks: ``rank x in`` and ``out x rank``."""
    linears = [module.shapes[0] for module in architecture.block if module.kind == "linear"]
    return [rank * size for out, into in linears for size in (into, out)] * architecture.num_layers
