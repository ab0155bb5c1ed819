"""Optimizer state by unit under ZeRO-3: built when a unit begins to train, released when it stops, and restored."""
