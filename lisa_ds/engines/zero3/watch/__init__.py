"""Monitors a run under ZeRO-3: norms of weights, gradients and updates by unit, and bytes of live model state."""
