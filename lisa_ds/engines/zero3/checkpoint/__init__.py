"""Checkpoints of a ZeRO-3 run: save and resume, consolidation into whole weights, and warm starts."""
