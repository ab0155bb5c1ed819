"""GaLore as it is run here, by galore-torch without DeepSpeed: nothing is sharded, every rank holds the whole model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from lisa_ds.config.formats import GALORE_CHUNK, QUANT_BLOCK, SMALLEST_INT8
from lisa_ds.config.roles import ROLES
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.gradients import GradientSettings
from lisa_ds.memory.methods.base import Method, added, tidy
from lisa_ds.memory.run_settings import Forecast, RunSettings
from lisa_ds.memory.step import StepSettings, step_peaks

_INT8_SCRATCH = 34
"""Bytes of an element, as measured, that lisa_ds's own 8-bit AdamW has beside the state while it steps."""


class Galore(Method):
    """Gradients and moments are in the type of the weights.

    A matrix of ``m x n`` has, on its shorter side, a projector of ``min(m, n) x rank`` and moments of ``rank x max(m, n)``; all other
    parameters have moments of their own size (arXiv:2403.03507, section 4).
    """

    name = "galore"
    title = "GaLore"

    def forecast(
        self,
        architecture: Architecture,
        run: RunSettings,
        *,
        whole: Architecture,
        sampled: Collection[int] | None,
        roles: Collection[str] | None,
    ) -> Forecast:
        """See the base class."""
        width, parameters = width_of_weights(run), architecture.num_parameters
        everything = architecture.shape.all()
        state = {
            "weights": width * parameters,
            "gradients": width * (max(everything) if run.galore.layerwise else parameters),
            "moments": moments(architecture, run),
            "buckets": width * parameters if run.world_size > 1 else 0,  # DDP's copies of the gradients
        }
        alone = StepSettings(
            tokens=run.tokens,
            world_size=1,
            sequence=run.sequence,
            width=run.width,
            checkpointing=run.checkpointing,
            gradients=GradientSettings(bucket_size=2**62, kept_width=0 if run.galore.layerwise else width),
            fused_loss=run.fused_loss,
        )
        peaks = step_peaks(architecture, alone, sampled=range(architecture.num_layers), roles=ROLES)
        projected = [out * into for out, into in _projected(architecture, run)]
        others = Counter(everything) - Counter(projected)
        # The update is projected back to a whole matrix; an SVD takes an fp32 copy and its three factors. Of what is not projected
        # AdamW makes the root of the second moment and the update, which 8-bit moments are not decoded for as a whole.
        whole_update = 2 * width * max(others, default=0)
        if run.galore.moments == "int8":
            whole_update = _INT8_SCRATCH * min(GALORE_CHUNK, max(everything)) if run.on_cpu else 0
        update = max(4 * 3 * max(projected, default=0), whole_update)
        # Autocast keeps a 16-bit copy of each weight until backward is over.
        cast = {"scratch": run.width * parameters} if width > run.width else {}
        phases = {
            "init": {"weights": state["weights"], "buckets": state["buckets"]},
            "forward": added({**state, "gradients": 0}, _kept(peaks.forward), cast),
            "backward": added({**state, "gradients": 0}, _kept(peaks.backward), cast),
            "step": added(state, {"scratch": update}),
        }
        return Forecast({name: tidy(parts) for name, parts in phases.items()}, {"export on rank 0": width * parameters})

    def notes(self, run: RunSettings) -> list[str]:
        """See the base class."""
        alone = "; it has no ZeRO-3 implementation: each rank holds all of it" if run.world_size > 1 else ""
        kinds = {"model": "moments in the model's type", "int8": "moments in 8 bits"}
        kept = "gradients of all parameters kept (galore.layerwise, which keeps one at a time, takes less)"
        if run.galore.layerwise:
            kept = "the gradient of one parameter at a time"
        return [f"GaLore: rank {run.galore.rank}, {kinds[run.galore.moments]}, {kept}{alone}"]

    def offloads(self, run: RunSettings) -> bool:
        """See the base class: there is no DeepSpeed to do it."""
        return False


def width_of_weights(run: RunSettings) -> int:
    """Bytes of an element of weights and gradients."""
    return 4 if run.galore.master_weights else run.width


def moments(architecture: Architecture, run: RunSettings) -> int:
    """Bytes of both moments and the projectors."""
    width, rank = width_of_weights(run), run.galore.rank
    projected = _projected(architecture, run)
    small = [_low_rank(out, into, rank, run.galore.proj_type) for out, into in projected]
    rest = Counter(architecture.shape.all()) - Counter(out * into for out, into in projected)
    sizes = [*(low for _, low in small), *rest.elements()]
    projectors = width * sum(projector for projector, _ in small)
    if run.galore.moments == "int8":
        return projectors + sum(map(_in_8_bits, sizes))
    return projectors + 2 * width * sum(sizes)


def _projected(architecture: Architecture, run: RunSettings) -> list[tuple[int, int]]:
    """``(out, in)`` of the matrices whose gradients are projected."""
    return architecture.linears(run.galore.targets, inside=True, conv1d=False)


def _low_rank(out: int, into: int, rank: int, proj_type: str) -> tuple[int, int]:
    """Elements of the projector and of the projected gradient, by galore-torch's ``proj_type``."""
    rank = min(rank, out, into)
    if proj_type == "full":
        return rank * (out + into), rank * rank
    on_the_right = {"std": out >= into, "reverse_std": out < into, "right": True, "left": False}[proj_type]
    return (rank * into, out * rank) if on_the_right else (out * rank, rank * into)


def _in_8_bits(numel: int) -> int:
    """Bytes of two moments: codes, and a scale for each block; small ones in fp32."""
    return 8 * numel if numel < SMALLEST_INT8 else 2 * numel + 8 * math.ceil(numel / QUANT_BLOCK)


def _kept(parts: dict[str, int]) -> dict[str, int]:
    """What a step has at its peak beside what stays: activations, logits, and gradients as far as they are there."""
    return {part: size for part, size in parts.items() if part in ("activations", "logits", "gradients")}
