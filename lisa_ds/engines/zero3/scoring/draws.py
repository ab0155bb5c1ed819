"""Builds the ``Draws`` of a run under ZeRO-3: scores, gradient statistics, memory budget and collectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lisa_ds.config import LisaConfig
from lisa_ds.engines.common.draws import Draws
from lisa_ds.engines.zero3 import parallel
from lisa_ds.engines.zero3.scoring import measure
from lisa_ds.engines.zero3.watch.memory_report import precision
from lisa_ds.engines.zero3.watch.statistics import BlockGradients, watch
from lisa_ds.memory import plan
from lisa_ds.sampling import LayerSampler


def draws_of(engine: Any, sampler: LayerSampler, calibration: measure.Calibration | None) -> Draws:
    """The ``Draws`` of a LISA engine that has been built."""
    watched = watch(engine.optimizer, engine._stack) if sampler.watches_gradients else None
    return Draws(
        sampler,
        measure=lambda: measure.measure(engine, sampler.config, calibration),
        gradients=None if watched is None else BlockGradients(watched, sampler.num_layers),
        affords=lambda count: _affords(engine, sampler.config, count),
        ranks=engine.ranks,
    )


def _affords(engine: Any, lisa: LisaConfig, count: int) -> bool:
    """Whether the model state of a rank stays within ``growth.memory_gb`` with ``count`` blocks sampled."""
    if lisa.growth is None or lisa.growth.memory_gb is None:
        return True
    buffers = [bucket.buffer for bucket in engine.optimizer.ipg_buckets.values()]
    most = plan(
        engine.model_shape,
        lisa.model_copy(update={"num_sampled_layers": count, "sampling_ratio": None, "growth": None}),
        world_size=parallel.data_parallel_size(engine),
        precision=replace(precision(engine), bucket_bytes=sum(b.numel() * b.element_size() for b in buffers)),
    ).most
    return sum(most.values()) <= lisa.growth.memory_gb * 1e9
