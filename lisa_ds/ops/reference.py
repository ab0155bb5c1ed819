"""Masked AdamW in plain torch: the specification that every kernel is tested against.

One step of AdamW (Loshchilov & Hutter, arXiv:1711.05101, as ``torch.optim.AdamW`` computes it) over the segments of a table, in
fp32, then rounded to the format of the state. It is written to be read, not to be fast.

Where no moments are kept, every step is the first one of AdamW, whose corrected moments are the gradient and its square:
``lr * g / (|g| + eps)`` beside the decay. As everywhere else, a gradient of 0 with an ``eps`` of 0 gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_ds.config.formats import QUANT_BLOCK
from lisa_ds.ops.segments import SEED, Hyper, Segment, SegmentTable

_MASK = 0xFFFFFFFF


def available() -> str | None:
    """None: it is always available; other backends return what they lack."""
    return None


def masked_adamw_(table: SegmentTable, factor: Tensor, found_inf: Tensor) -> None:
    """Update every segment; see :func:`lisa_ds.ops.masked_adamw_`. Reads ``found_inf`` on the host, as kernels do not."""
    if bool(found_inf):
        return
    for segment, hyper, seed in zip(table.segments, table.hypers, table.addresses[:, SEED].tolist(), strict=True):
        if segment.numel:
            _update(segment, hyper, seed, factor)


def sum_of_squares(table: SegmentTable) -> Tensor:
    """Sum of the squares of all gradients of the table, float64: ``()``."""
    squares = [segment.grad.double().square().sum() for segment in table.segments]
    return torch.stack(squares).sum()


def _update(segment: Segment, hyper: Hyper, seed: int, factor: Tensor) -> None:
    step = segment.step.item()
    lr = float(hyper.lr) * hyper.lr_scale
    gradient = segment.grad.reshape(-1).float() * factor
    index = torch.arange(segment.numel, device=gradient.device)
    if segment.exp_avg is None:
        rate, quotient = lr, gradient / (gradient.abs() + hyper.eps)
    else:
        beta1, beta2 = hyper.betas
        exp_avg, exp_avg_sq = _moments(segment)
        exp_avg = exp_avg + (1 - beta1) * (gradient - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        rate, quotient = lr / correction1, exp_avg / (exp_avg_sq.sqrt() / correction2**0.5 + hyper.eps)
        _keep_moments(segment, exp_avg, exp_avg_sq, random_bits(seed, int(step), index, FOR_SECOND_MOMENT))
    source = segment.weight if segment.master is None else segment.master
    assert source is not None
    updated = source.reshape(-1).float() * (1 - lr * hyper.weight_decay) - rate * quotient
    if segment.master is not None:
        segment.master.view(-1).copy_(updated)
        if segment.weight is not None:
            segment.weight.view(-1).copy_(updated)
    elif segment.in_place_fp32:
        source.view(-1).copy_(updated)
    else:
        source.view(-1).copy_(round_stochastically(updated, random_bits(seed, int(step), index, FOR_WEIGHT)))


def _moments(segment: Segment) -> tuple[Tensor, Tensor]:
    assert segment.exp_avg is not None
    assert segment.exp_avg_sq is not None
    first, second = segment.exp_avg.reshape(-1), segment.exp_avg_sq.reshape(-1)
    if segment.exp_avg_scale is None or segment.exp_avg_sq_scale is None:
        return first.float(), second.float()
    return dequantise_signed(first, segment.exp_avg_scale), dequantise_unsigned(second, segment.exp_avg_sq_scale)


def _keep_moments(segment: Segment, exp_avg: Tensor, exp_avg_sq: Tensor, bits: Tensor) -> None:
    assert segment.exp_avg is not None
    assert segment.exp_avg_sq is not None
    first, second = segment.exp_avg.view(-1), segment.exp_avg_sq.view(-1)
    if segment.exp_avg_scale is not None and segment.exp_avg_sq_scale is not None:
        for kept, scale, (codes, scales) in (
            (first, segment.exp_avg_scale, quantise_signed(exp_avg)),
            (second, segment.exp_avg_sq_scale, quantise_unsigned(exp_avg_sq)),
        ):
            kept.copy_(codes)
            scale.copy_(scales)
        return
    first.copy_(exp_avg)
    # The second moment moves by a thousandth of itself in a step, less than half of bfloat16's last place: rounded to
    # nearest it would stand still.
    second.copy_(round_stochastically(exp_avg_sq, bits) if second.dtype == torch.bfloat16 else exp_avg_sq)


# ---- stochastic rounding ------------------------------------------------------------------------------------------


FOR_WEIGHT, FOR_SECOND_MOMENT = 0, 1


def random_bits(seed: int, step: int, index: Tensor, purpose: int = FOR_WEIGHT) -> Tensor:
    """16 random bits for each element, from (seed, step, index) alone: ``(numel,)``, int64 below 2**16.

    Two neighbours share a word of 32 bits: the half that rounds the weight of one rounds the second moment of the
    other. The mixing function is lowbias32 (C. Wellons, hash-prospector), with a key at its start and another in its
    middle.

    Args:
        seed: A segment's 64-bit word, see :func:`lisa_ds.ops.segments.seed_word`.
        step: The step being taken, from 1.
        index: Places in the segment, ``(numel,)``, int64.
        purpose: Which of an element's two numbers.
    """
    begin = _mix(torch.tensor((seed & _MASK) + step * 0x9E3779B9 & _MASK, device=index.device))
    middle = _mix(torch.tensor((seed >> 32) & _MASK, device=index.device) ^ begin)
    pair = index >> 1
    word = _mix((pair + begin) & _MASK, (middle + (pair >> 32) * 0x85EBCA6B) & _MASK)
    return (word >> 16 * ((index & 1) ^ purpose)) & 0xFFFF


def _mix(word: Tensor, key: Tensor | int = 0) -> Tensor:
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _MASK
    word = word ^ key
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _MASK
    return word ^ (word >> 16)


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """``value`` (float32) as bfloat16: up with the probability by which it lies beyond the lower neighbour.

    Args:
        value: ``(numel,)``.
        bits: 16 random bits for each, ``(numel,)``.
    """
    word = value.contiguous().view(torch.int32).long() & _MASK
    word = torch.where(value.isnan(), 0x7FC00000, word + bits) >> 16
    return torch.where(word >= 2**15, word - 2**16, word).to(torch.int16).view(torch.bfloat16)


# ---- 8-bit moments ------------------------------------------------------------------------------------------------

# A scale holds the largest magnitude of its block. Codes are spaced by a square root (first moment, signed) and a fourth root
# (second moment), so that small values keep relative precision: the update divides one by the root of the other.

_LEAST = 1e-37  # a block with nothing larger is kept as zero


def quantise_signed(value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``(numel,)``, int8 in -127..127, and scales ``(ceil(numel / 256),)`` of a first moment."""
    blocks = _blocks(value)
    largest = blocks.abs().amax(1)
    codes = (blocks.abs() * _inverse(largest)[:, None]).sqrt().mul(127).round() * blocks.sign()
    return codes.to(torch.int8).reshape(-1)[: value.numel()], _kept(largest)


def dequantise_signed(codes: Tensor, scales: Tensor) -> Tensor:
    """The values behind the codes of :func:`quantise_signed`, float32."""
    code = codes.float()
    return code * code.abs() * _spread(scales * (1 / 127**2), codes.numel())


def quantise_unsigned(value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``(numel,)``, uint8 in 1..255, and scales of a second moment.

    No code stands for zero: a small second moment that became zero would leave its update to be divided by eps alone.
    """
    blocks = _blocks(value)
    largest = blocks.amax(1)
    codes = (blocks * _inverse(largest)[:, None]).sqrt().sqrt().mul(255).round().clamp_(min=1.0)
    return codes.to(torch.uint8).reshape(-1)[: value.numel()], _kept(largest)


def dequantise_unsigned(codes: Tensor, scales: Tensor) -> Tensor:
    """The values behind the codes of :func:`quantise_unsigned`, float32."""
    square = codes.float().square()
    return square * square * _spread(scales * (1 / 255**4), codes.numel())


def _blocks(value: Tensor) -> Tensor:
    padding = -value.numel() % QUANT_BLOCK
    return torch.nn.functional.pad(value, (0, padding)).view(-1, QUANT_BLOCK)


def _inverse(largest: Tensor) -> Tensor:
    return torch.where(largest > _LEAST, 1 / largest, 0.0)


def _kept(largest: Tensor) -> Tensor:
    return torch.where(largest > _LEAST, largest, 0.0)


def _spread(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(QUANT_BLOCK)[:numel]
