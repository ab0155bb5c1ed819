"""Checkpoints of a ZeRO-3 run: saved and resumed, read back into whole weights, and warm starts from them."""
