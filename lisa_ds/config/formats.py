"""What optimizer state may be kept in, and the sizes in which it is worked on: told once to planner, kernels and engine.

The planner has no torch, and so can ask neither the kernels nor the engine.
"""

from __future__ import annotations

from typing import Literal

Weights = Literal["mixed", "stochastic_rounding"]
"""How 16-bit weights are updated: beside an fp32 master copy, or in place, rounded at random."""

Moments = Literal["fp32", "bf16", "int8"]
"""What the two moments are kept in."""

QUANT_BLOCK = 256
"""Elements of 8-bit moments that share an fp32 scale. Blocks begin with their segment; csrc/ has it as kQuantBlock."""

SCORING_CHUNK = 2**20
"""Elements of a gradient that scoring works on at a time, in fp64 and with a random sign for each."""
