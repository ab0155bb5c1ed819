"""Checkpoints as files: exports trained models and adapters for other programs, merges adapters, and gives their base back."""

from __future__ import annotations

from lisa_ds.checkpoint.export import export as export
from lisa_ds.checkpoint.in_memory import merged as merged
from lisa_ds.checkpoint.merging import merge as merge
from lisa_ds.checkpoint.merging import unmerge as unmerge

__all__ = ["export", "merge", "merged", "unmerge"]
