"""What a run takes on one rank in each of its phases, before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lisa_ds.memory import other_methods, residents
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.probe import probe_bytes
from lisa_ds.memory.run_settings import PARTS, Forecast, RunSettings
from lisa_ds.memory.state import ModelShape, default_bucket
from lisa_ds.memory.step import StepSettings, step_peaks


def forecast(
    architecture: Architecture,
    run: RunSettings,
    sampled: Collection[int] | None = None,
    roles: Collection[str] | None = None,
) -> Forecast:
    """The peaks of a run under ZeRO-3.

    The largest draw is planned for, and rows as long as they may be. Not in it: the device's own context, what the communication
    library takes, and the fragmentation of the allocator.

    Args:
        architecture: The model.
        run: Its settings.
        sampled: LISA's blocks, to plan for one draw; None for the one that takes the most.
        roles: Which of embeddings, head and rest train under LISA; None for all that may.

    Raises:
        ConfigError: The method's settings do not fit the model.
    """
    whole = architecture
    architecture = architecture.split(run.tensor_parallel)
    if run.method == "galore":
        return other_methods.galore(architecture, run)
    held = residents.of(architecture, run, sampled, roles)
    bucket = bucket_elements(architecture.shape, run)
    settings = StepSettings(
        tokens=run.tokens,
        world_size=run.world_size,
        width=run.width,
        checkpointing=run.checkpointing,
        bucket_size=bucket,
        forgets_inputs=run.method == "lisa",
        adapter_rank=run.lora_rank if run.method == "lora" else 0,
        fused_loss=run.fused_loss,
        gather=run.gather,
    )
    peaks = step_peaks(architecture, settings, sampled=held.blocks, roles=held.roles)
    state = {**held.state, "buckets": bucket * run.width}
    host: dict[str, int] = {}
    if run.offload_optimizer:
        host = {part: state.pop(part) for part in ("gradients", "master", "moments")}
        # The update is computed there, from an fp32 gradient beside the one that was reduced.
        host["gradients"] += host["master"]
    if run.second_copies > 1:
        state["weights"] += run.width * -(-sum(architecture.shape.all()) // run.second_copies)
    if run.offload_param:
        host["weights"] = state.pop("weights")
    small = {"gathered": peaks.persistent}
    # Stock ZeRO-3 casts a sub-group's gradient to fp32; LISA's launch reads it as it is.
    cast = 0 if run.method == "lisa" or run.offload_optimizer else (4 + run.width) * held.sub_group
    phases = {
        "init": _init(state, held, run),
        "forward": _add(state, peaks.forward),
        "backward": _add(state, peaks.backward),
        "step": _add(state, small, {"scratch": cast}),
    }
    if run.method == "lisa" and run.lisa.sampler.calibrates:
        phases["scores"] = _add(state, *_scoring(architecture, run, settings))
    if run.method == "lisa":
        phases["switch"] = max((phases["step"], _switch(state, small, held, run)), key=_total)
    gathered = held.largest_parameter * run.width if run.world_size > 1 else 0
    phases["export"] = _add(state, small, {"gathered": gathered})
    host["export on rank 0"] = run.width * whole.num_parameters
    return Forecast({name: _tidy(parts) for name, parts in phases.items()}, {k: v for k, v in host.items() if v})


def _scoring(
    architecture: Architecture, run: RunSettings, settings: StepSettings
) -> tuple[dict[str, int], dict[str, int]]:
    """What scoring all blocks by their gradients takes: a backward pass of those scored together, and what it keeps."""
    chosen, kind = run.lisa.sampler, run.lisa.sampler.kind
    assert kind.probe is not None
    count = len(architecture.shape.layers)
    together = min(chosen.probe_blocks, count) if kind.by_windows else count
    rows = run.sequence if kind.by_row else run.tokens
    # Gradients are taken one by one, and no bucket is filled; from the lowest blocks backward has the longest way. ZeRO-3 does not
    # know the order of such a pass, so it fetches nothing ahead and holds nothing back.
    alone = replace(settings.gather, prefetch_bucket_size=0, max_reuse_distance=0)
    peaks = step_peaks(
        architecture, replace(settings, tokens=rows, bucket_size=0, gather=alone), sampled=range(together), roles=()
    ).backward
    own = {part: size for part, size in peaks.items() if part != "gradients in flight"}
    kept = probe_bytes(
        architecture.shape, kind=kind.probe, probe_blocks=together, world_size=run.world_size, weight_bytes=run.width
    )
    return own, {"scratch": kept}


def bucket_elements(shape: ModelShape, run: RunSettings) -> int:
    """Elements of the reduce bucket of a run."""
    if run.bucket_size is not None:
        return run.bucket_size
    return default_bucket(shape) if run.method == "lisa" else 500_000_000


def _init(state: Mapping[str, int], held: residents.Residents, run: RunSettings) -> dict[str, int]:
    """What Stage 3 does one after the other: lays weights out, makes fp32 copies, a gradient to warm up with, hooks."""
    weights = {"weights": state.get("weights", 0)}
    masters = {**weights, "master": state.get("master", 0)}
    everything = {part: size for part, size in state.items() if part != "moments"}
    moments = [
        {**weights, "scratch": run.width * held.trainable if run.on_cpu else 0},
        {**masters, "scratch": 0 if run.offload_optimizer else 4 * held.sub_group},
        # To hook into its gradient, each trainable parameter is gathered for a moment.
        {**everything, "gathered": run.width * held.largest_trainable},
    ]
    return max(moments, key=_total)


def _switch(
    state: Mapping[str, int], small: Mapping[str, int], held: residents.Residents, run: RunSettings
) -> dict[str, int]:
    """Gradients and the state of what leaves are dropped; what comes in is copied to fp32, then gradients are made anew.

    What comes in has no moments before its first step.
    """
    if run.offload_optimizer:
        return _add(state, small)
    after = {**state, "moments": held.always_moments}
    cast = 4 * held.switched if state["master"] and run.width < 4 else 0
    copying = {**after, "gradients": 0}
    return max((_add(copying, small, {"scratch": cast}), _add(after, small)), key=_total)


def _add(*tables: Mapping[str, int]) -> dict[str, int]:
    return {part: sum(table.get(part, 0) for table in tables) for part in PARTS}


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _tidy(parts: Mapping[str, int]) -> dict[str, int]:
    return {part: parts[part] for part in PARTS if parts.get(part)}
