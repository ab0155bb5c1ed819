"""The ZeRO-3 optimizer as a window over the sampled units, and its fused step over the parameters with a gradient."""
