"""Formats of optimizer state, and the block sizes of kernels and scoring: shared by planner, kernels and engine.

They are here because the planner must not import torch, and so can read them neither from the kernels nor the engine.
"""

from __future__ import annotations

from typing import Literal

Weights = Literal["mixed", "stochastic_rounding"]
"""How 16-bit weights are updated: beside an fp32 master copy, or in place, rounded at random."""

Moments = Literal["fp32", "bf16", "int8", "none"]
"""The format of the two moments; ``none``: there are none, and every step is AdamW's first."""

QUANT_BLOCK = 256
"""Elements of 8-bit moments that share an fp32 scale. Blocks begin with their segment; csrc/ has it as kQuantBlock."""

SMALLEST_INT8 = 4096
"""GaLore: parameters with fewer elements keep fp32 moments where the others are in 8 bits, as in bitsandbytes."""

GALORE_CHUNK = 2**20
"""Elements that 8-bit GaLore on the CPU steps at a time, with their moments in fp32."""

SCORING_CHUNK = 2**20
"""Elements of a gradient that scoring works on at a time, in fp64 and with a random sign for each."""
