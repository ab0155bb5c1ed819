"""The ZeRO-3 optimizer as a window over the sampled units, and its step: fused, limited, and without what has no gradient."""
