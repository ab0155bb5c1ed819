"""GaLore as in its authors' code, not the layerwise variant: nothing is sharded, every rank holds the whole model."""

from __future__ import annotations

from collections.abc import Collection

from lisa_ds.config.roles import ROLES
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.methods.base import Method, added, tidy
from lisa_ds.memory.run_settings import Forecast, RunSettings
from lisa_ds.memory.step import StepSettings, step_peaks


class Galore(Method):
    """Gradients and moments are in the model's type.

    A matrix of a block of ``m x n`` has moments of ``rank x max(m, n)`` and a projector of ``min(m, n) x rank``; all other
    parameters have moments of their own size (arXiv:2403.03507, section 4).
    """

    name = "galore"
    title = "GaLore"
    shards = False

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
        parameters = architecture.num_parameters
        matrices = [module.shapes[0] for module in architecture.block if module.kind in ("linear", "experts")]
        projected = small = 0
        for *more, out, into in matrices:
            times = architecture.num_layers * (more[0] if more else 1)
            projected += times * out * into
            small += times * run.galore_rank * (2 * max(out, into) + min(out, into))
        state = {
            "weights": run.width * parameters,
            "gradients": run.width * parameters,
            "moments": run.width * (2 * (parameters - projected) + small),
        }
        alone = StepSettings(
            run.tokens, 1, run.width, checkpointing=run.checkpointing, bucket_size=2**62, fused_loss=run.fused_loss
        )
        peaks = step_peaks(architecture, alone, sampled=range(architecture.num_layers), roles=ROLES)
        phases = {
            "init": {"weights": state["weights"]},
            "forward": added(state, _kept(peaks.forward)),
            "backward": added(state, _kept(peaks.backward)),
            "step": state,
        }
        return Forecast(
            {name: tidy(parts) for name, parts in phases.items()}, {"export on rank 0": run.width * parameters}
        )

    def notes(self, run: RunSettings) -> list[str]:
        """See the base class."""
        alone = "; it has no ZeRO-3 implementation: each rank holds all of it" if run.world_size > 1 else ""
        return [
            f"GaLore: galore_adamw, rank {run.galore_rank}, moments in the model's type, gradients of all parameters kept "
            f"(galore_adamw_layerwise, which keeps them for one parameter at a time, takes less){alone}"
        ]


def _kept(parts: dict[str, int]) -> dict[str, int]:
    """Activations and logits at a step's peak; gradients are counted apart."""
    return {part: size for part, size in parts.items() if part in ("activations", "logits")}
