"""What LoRA and GaLore take for the same model and batch, to be planned beside LISA."""

from __future__ import annotations

from typing import Any

from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.run_settings import Forecast, RunSettings
from lisa_ds.memory.step import StepSettings, step_peaks


def adapters(architecture: Architecture, rank: int) -> list[int]:
    """Elements of each matrix of LoRA adapters on every linear of the blocks: ``rank x in`` and ``out x rank``."""
    linears = [module.shapes[0] for module in architecture.block if module.kind == "linear"]
    return [rank * size for out, into in linears for size in (into, out)] * architecture.num_layers


def lora_state(architecture: Architecture, run: RunSettings) -> tuple[dict[str, int], list[int]]:
    """Model state under ZeRO-3 with adapters that train in the model's type, with an fp32 master copy.

    Returns:
        Bytes by part, and the elements of each matrix that trains.
    """
    parts = adapters(architecture, run.lora_rank)
    trained = sum(-(-numel // run.world_size) for numel in parts)
    frozen = sum(-(-numel // run.world_size) for numel in architecture.shape.all())
    state = {
        "weights": run.width * (frozen + trained),
        "gradients": run.gradient_width * trained,
        "master": 4 * trained,
        "moments": 8 * trained,
    }
    return state, parts


def described(run: RunSettings) -> list[str]:
    """Which variants of LoRA and GaLore are planned."""
    alone = "; it has no ZeRO-3 implementation: each rank holds all of it" if run.world_size > 1 else ""
    return [
        f"LoRA: rank {run.lora_rank} on every linear of the blocks, with an fp32 master copy of the adapters",
        f"GaLore: galore_adamw, rank {run.galore_rank}, moments in the model's type, gradients of all parameters kept "
        f"(galore_adamw_layerwise, which keeps them for one parameter at a time, takes less){alone}",
    ]


def galore(architecture: Architecture, run: RunSettings) -> Forecast:
    """GaLore as its authors' code has it, not layer by layer: every rank holds the whole model, as nothing of it is sharded.

    Gradients and moments are in the model's type. A matrix of a block of ``m x n`` has moments of ``rank x max(m, n)`` and a
    projector of ``min(m, n) x rank``; all other parameters have moments of their own size (arXiv:2403.03507, section 4).
    """
    parameters = architecture.num_parameters
    matrices = [module.shapes[0] for module in architecture.block if module.kind in ("linear", "experts")]
    projected = small = 0
    for *more, out, into in matrices:
        times = architecture.num_layers * (more[0] if more else 1)
        projected += times * out * into
        small += times * run.galore_rank * (2 * max(out, into) + min(out, into))
    state: dict[str, Any] = {
        "weights": run.width * parameters,
        "gradients": run.width * parameters,
        "moments": run.width * (2 * (parameters - projected) + small),
    }
    alone = StepSettings(
        run.tokens, 1, run.width, checkpointing=run.checkpointing, bucket_size=2**62, fused_loss=run.fused_loss
    )
    everything = range(architecture.num_layers)
    peaks = step_peaks(architecture, alone, sampled=everything, roles=("embeddings", "lm_head", "rest"))
    forward, backward = peaks.forward, {**peaks.backward, "gradients in flight": 0}
    phases = {
        "init": {"weights": state["weights"]},
        "forward": {**state, **forward},
        "backward": {**state, **backward},
        "step": state,
    }
    order = ("weights", "gradients", "moments", "activations", "logits")
    tidy = {name: {part: parts[part] for part in order if parts.get(part)} for name, parts in phases.items()}
    return Forecast(tidy, {"export on rank 0": run.width * parameters})
