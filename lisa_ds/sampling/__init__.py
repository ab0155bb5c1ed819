"""The sampler: from a run's config and its model's number of blocks to a schedule of which blocks train."""

from __future__ import annotations

from lisa_ds.sampling.sampler import LayerSampler, fingerprint, resolve_interval_steps
from lisa_ds.sampling.schedule import draw

__all__ = ["LayerSampler", "draw", "fingerprint", "resolve_interval_steps"]
