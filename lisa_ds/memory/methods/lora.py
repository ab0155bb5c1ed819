"""LoRA: frozen weights, and adapters on linears of the blocks, under stock ZeRO-3 or ZeRO-2."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.methods.base import UnderZero3
from lisa_ds.memory.residents import Residents, residents
from lisa_ds.memory.run_settings import RunSettings
from lisa_ds.memory.state import ModelShape, partitions
from lisa_ds.memory.tape import Adapters

_ALIGNED = 2
"""Elements that ZeRO-2's flat buffer is a multiple of, on each rank."""


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
        matrices = architecture.adapters(run.lora.targets, run.lora.rank, dora=run.lora.dora)
        shape = architecture.shape
        if run.stage == 2:
            aligned = _ALIGNED * run.world_size
            flat = -(-sum(matrices) // aligned) * aligned
            trained, weights = flat // run.world_size, sum(shape.all()) + flat
        else:
            trained = sum(partitions(matrices, run.world_size))
            weights = sum(partitions(shape.all(), run.world_size)) + trained
        state = {
            "weights": run.width * weights,
            "gradients": run.gradient_width * trained,
            "master": 4 * trained,
            "moments": 8 * trained,
        }
        return residents(shape, run, state, trained=matrices, blocks=(), roles=())

    def stage(self, run: RunSettings) -> int:
        """See the base class."""
        return run.stage

    def adapters(self, architecture: Architecture, run: RunSettings) -> Mapping[int, Adapters]:
        """See the base class."""
        lora = run.lora
        chosen = architecture.chosen(lora.targets, inside=False, conv1d=True)
        mask = 0 if lora.dropout == 0 else run.width if run.on_cpu else 1  # torch's on a GPU is of bytes
        return {block: Adapters(lora.rank, places, mask, lora.dora) for block, places in chosen.items()}

    def least(self, shape: ModelShape, run: RunSettings) -> int:
        """See the base class; under ZeRO-2 each rank holds all weights."""
        return run.width * sum(shape.all()) if run.stage == 2 else super().least(shape, run)

    def notes(self, run: RunSettings) -> list[str]:
        """See the base class."""
        where = "every linear of the blocks" if run.lora.targets == "all-linear" else f"{run.lora.targets}"
        stage = ", under ZeRO-2: each rank holds all weights" if run.stage == 2 else ""
        return [f"LoRA: rank {run.lora.rank} on {where}, with an fp32 master copy of the adapters{stage}"]
