"""FLOPs of a training step, from the model's shape alone, and the peak FLOP/s of devices. Without torch.

Counted are matrix products, two FLOPs for a multiplication and an addition, as in appendix B of PaLM (arXiv:2204.02311):
a token costs ``6 N + 12 L H Q T`` where all N weights train, L blocks have H heads of size Q, and a row is T tokens long.
Of the 6 N, 2 N are forward, 2 N backward to activations and 2 N backward to weights; of the attention's 12 L H Q T, 4 are
forward and 8 backward. Look-ups in an embedding cost nothing, and causal attention counts as if all positions saw all.

LISA computes less, and only that is counted: forward through everything, backward to activations down to where backward
is cut off (below the lowest block or embedding that trains), and backward to weights for sampled blocks alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lisa_ds.errors import ConfigError

PEAK_VARIABLE = "LISA_DS_PEAK_TFLOPS"

# Dense FLOP/s of bf16 matrix products (fp16 where there is no bf16) with fp32 accumulation, in TFLOP/s, by the maker's data
# sheets; where these give the figure with sparsity, half of it. The first pattern that occurs in a device's name is it.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bH200 NVL\b", 835.5),  # NVIDIA H200 data sheet: 1,671 with sparsity
    (r"\bG?H200\b", 989.4),  # NVIDIA H200 and GH200 data sheets: 1,979 with sparsity
    (r"\bH100 NVL\b", 835.5),  # NVIDIA H100 data sheet: 1,671 with sparsity
    (r"\bH100 PCIe\b", 756.0),  # NVIDIA H100 data sheet: 1,513 with sparsity
    (r"\bH100\b", 989.4),  # SXM, which calls itself "H100 80GB HBM3"; NVIDIA H100 data sheet: 1,979 with sparsity
    (r"\bA100\b", 312.0),  # NVIDIA A100 data sheet
    (r"\bA10\b", 125.0),  # NVIDIA A10 data sheet
    (r"\bL40S\b", 362.0),  # NVIDIA L40S data sheet
    (r"\bL40\b", 181.0),  # NVIDIA L40 data sheet
    (r"\bL4\b", 121.0),  # NVIDIA L4 data sheet: 242 with sparsity
    (r"\bRTX 4090\b", 165.2),  # NVIDIA Ada architecture whitepaper, fp16 with fp32 accumulation
    (r"\bRTX 3090\b", 71.0),  # NVIDIA Ampere GA102 whitepaper, fp16 with fp32 accumulation
    (r"\bV100-PCIE", 112.0),  # NVIDIA V100 data sheet, fp16
    (r"\bV100\b", 125.0),  # NVIDIA V100 data sheet, fp16, SXM2
    (r"\bMI250X\b", 191.5),  # AMD MI250X data sheet: 383.0 of two dies, each of which is a device
    (r"\bMI300X\b", 1307.4),  # AMD MI300X data sheet
)


@dataclass(frozen=True)
class ComputeShape:
    """The matrices of a decoder or encoder, by how many weights multiply a token's activations."""

    blocks: tuple[int, ...]
    """Weights of the matrices of each block, in the order they run. Norms and biases are no matrices."""

    attention: int
    """Number of query heads times the size of one."""

    head: int
    """Weights of the head, tied to the embeddings or not."""


@dataclass(frozen=True)
class Trained:
    """What has gradients in a step."""

    blocks: frozenset[int]
    """Blocks in which something trains. What trains may be a norm before all matrices, so the inputs of all count as needing gradients."""

    matrices: int | None = None
    """Elements of the matrices that train in them; None for all."""

    embeddings: bool = True
    """Whether the embeddings, or anything else below the blocks, train."""

    rest: bool = True
    """Whether the final norm trains."""

    head: bool = True
    """Whether the head's weight trains; a tied one does with the embeddings."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of a step, per token, pair of tokens and logit."""

    per_token: float
    per_pair: float
    """For each pair of tokens of a row: a row of t tokens has t * t pairs."""

    per_logit: float
    """For each position whose logits are computed."""

    recomputed_per_token: float
    """What activation checkpointing recomputes: the forward of the blocks that backward reaches."""

    recomputed_per_pair: float

    def model(self, tokens: float, pairs: float, logits: float) -> float:
        """FLOPs without recomputation; divided by time and peak they give the MFU."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_logit * logits

    def hardware(self, tokens: float, pairs: float, logits: float, *, recomputes: bool) -> float:
        """FLOPs with recomputation, if there is any; for all positions, padding included, they give the HFU."""
        again = self.recomputed_per_token * tokens + self.recomputed_per_pair * pairs if recomputes else 0.0
        return self.model(tokens, pairs, logits) + again


def cost(shape: ComputeShape, trained: Trained) -> Cost:
    """What a step costs while ``trained`` has gradients.

    Example:
        >>> shape = ComputeShape(blocks=(100, 100), attention=8, head=50)
        >>> full = cost(shape, Trained(frozenset({0, 1})))
        >>> full.model(tokens=1, pairs=3, logits=1) == 6 * 250 + 12 * 2 * 8 * 3  # a token of a row of 3
        True
    """
    count = len(shape.blocks)
    lowest = 0 if trained.embeddings else min(trained.blocks, default=count)
    passed = sum(shape.blocks[lowest:])
    sampled = sum(shape.blocks[block] for block in trained.blocks) if trained.matrices is None else trained.matrices
    reaches_head_input = trained.rest or lowest < count
    return Cost(
        per_token=2.0 * (sum(shape.blocks) + passed + sampled),
        per_pair=4.0 * shape.attention * count + 8.0 * shape.attention * (count - lowest),
        per_logit=2.0 * shape.head * (1 + reaches_head_input + trained.head),
        recomputed_per_token=2.0 * passed,
        recomputed_per_pair=4.0 * shape.attention * (count - lowest),
    )


def peak_flops(device: str, environ: Mapping[str, str]) -> float | None:
    """The peak FLOP/s of a device: from ``LISA_DS_PEAK_TFLOPS`` if set, else by its name.

    Args:
        device: As ``torch.cuda.get_device_name`` has it.
        environ: Environment variables.

    Returns:
        None for a device that is not in the table.

    Raises:
        ConfigError: ``LISA_DS_PEAK_TFLOPS`` is no number above 0.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", {})
        312000000000000.0
    """
    given = environ.get(PEAK_VARIABLE)
    if given:
        try:
            peak = float(given)
        except ValueError:
            peak = 0.0
        if not 0 < peak < float("inf"):
            raise ConfigError(
                f"{PEAK_VARIABLE}: should be the dense TFLOP/s of one GPU, a number above 0, got {given!r}; or leave it out"
            )
        return peak * 1e12
    return next((tflops * 1e12 for pattern, tflops in PEAK_TFLOPS if re.search(pattern, device)), None)
