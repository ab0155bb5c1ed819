"""Optimizer state by unit under ZeRO-3: built when a unit comes in, released when it leaves, restored and counted in between."""
