"""Measures the scores of blocks for a sampler: on calibration batches, on the weights, or in training."""

from __future__ import annotations

from typing import Any

from lisa_ds.config import LisaConfig
from lisa_ds.engines.common import scores
from lisa_ds.engines.zero3.scoring.probe import Calibration, Probe
from lisa_ds.engines.zero3.watch.statistics import UnitStatistics
from lisa_ds.errors import ConfigError, EngineError

__all__ = ["Calibration", "check", "measure"]


def check(engine: Any, lisa: LisaConfig, calibration: Calibration | None) -> None:
    """Refuse a sampler whose scores could not be measured, before the optimizer is laid out.

    Raises:
        ConfigError: It measures scores on calibration batches, and there are none.
        EngineError: It does, and ranks share layers.
    """
    chosen = lisa.sampler
    if not chosen.calibrates:
        return
    if calibration is None:
        raise ConfigError(
            f"{lisa.where('sampler.name')}: {chosen.name!r} measures scores on calibration batches: give initialize(..., "
            "calibration=...), or profile the model beforehand with `lisa-ds profile` and use 'fixed_scores'"
        )
    if engine.mp_world_size > 1 or engine.sequence_parallel_size > 1:
        raise EngineError(
            f"lisa.sampler: {chosen.name!r} measures gradients of whole layers on whole sequences, but here ranks share them; "
            "profile the model without that by `lisa-ds profile`, and use 'fixed_scores'"
        )


def measure(engine: Any, lisa: LisaConfig, calibration: Calibration | None) -> list[float]:
    """The score of each block, equal on all ranks. Every rank must call it, between optimizer steps."""
    chosen = lisa.sampler
    kind = chosen.kind.probe
    if kind is None:
        norms = UnitStatistics(engine.optimizer, engine._stack).weight_norms()
        return scores.of_weights(norms, len(engine._stack.units))
    assert calibration is not None  # see check
    probe = Probe(
        engine.optimizer,
        engine.module,
        engine._stack,
        engine._backward_start,
        calibration,
        probe_blocks=chosen.probe_blocks,
        seed=lisa.seed,
    )
    return scores.drawable(probe.scores(kind))
