"""Checkpoints as files: exports trained models and adapters for other programs."""

from __future__ import annotations

from lisa_ds.checkpoint.export import export as export

__all__ = ["export"]
