"""LISA under DeepSpeed ZeRO-3: optimizer state, gradients and master weights for the sampled layers only."""

from lisa_ds.engines.zero3.engine import LisaEngine
from lisa_ds.engines.zero3.entry import armed, initialize

__all__ = ["LisaEngine", "armed", "initialize"]
