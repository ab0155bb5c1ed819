"""Segments of every mode for the kernel tests, built from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lisa_ds.ops import Hyper, Segment, SegmentTable
from lisa_ds.ops.segments import QUANT_BLOCK

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Mode:
    """Types of a launch."""

    name: str
    weight: torch.dtype = BF16
    grad: torch.dtype = BF16
    master: bool = True
    moments: torch.dtype | None = FP32
    """None: there are none."""


MODES = [
    Mode("fp32", weight=FP32, grad=FP32, master=False),
    Mode("fp32_bf16_grad", weight=FP32, grad=BF16, master=False),
    Mode("fp32_with_copy", weight=FP32, grad=FP32),
    Mode("mixed"),
    Mode("mixed_fp32_grad", grad=FP32),
    Mode("mixed_fp16", weight=FP16, grad=FP16),
    Mode("sr_fp32_moments", master=False),
    Mode("sr_fp32_grad", grad=FP32, master=False),
    Mode("sr_16bit", master=False, moments=BF16),
    Mode("int8_master", moments=torch.int8),
    Mode("int8_fp32", weight=FP32, grad=FP32, master=False, moments=torch.int8),
    Mode("int8_sr", master=False, moments=torch.int8),
    Mode("none_master", moments=None),
    Mode("none_fp32", weight=FP32, grad=FP32, master=False, moments=None),
    Mode("none_fp16", weight=FP16, grad=FP16, moments=None),
    Mode("none_sr", master=False, moments=None),
    Mode("none_sr_fp32_grad", grad=FP32, master=False, moments=None),
    Mode("none_sr_fp16_grad", grad=FP16, master=False, moments=None),
]

SIZES = [1, 0, 7, 255, 256, 257, 2048, 2049, 4096 + 513, 3 * 2048]
"""Empty, one element, less than a vector, around a quantisation block, around a block."""


def make_segment(
    mode: Mode, numel: int, *, seed: int = 0, stream: int = 0, offset: int = 0, device: str = "cpu", step: int = 0
) -> Segment:
    """A segment with weights near 1 and gradients near 0.1; ``offset`` shifts each tensor off its alignment."""
    draw = torch.Generator().manual_seed(1000 * seed + numel)

    def tensor(dtype: torch.dtype, value: Tensor) -> Tensor:
        room = torch.zeros(value.numel() + offset, dtype=dtype, device=device)
        room[offset:] = value.to(dtype)
        return room[offset:]

    start = torch.randn(numel, generator=draw)
    weight = tensor(mode.weight, start)
    zeros, scales = torch.zeros(numel), torch.zeros(-(-numel // QUANT_BLOCK))
    quantised = mode.moments == torch.int8
    return Segment(
        weight=weight,
        grad=tensor(mode.grad, 0.1 * torch.randn(numel, generator=draw)),
        master=tensor(FP32, weight.float().cpu()) if mode.master else None,
        exp_avg=None if mode.moments is None else tensor(mode.moments, zeros),
        exp_avg_sq=None if mode.moments is None else tensor(torch.uint8 if quantised else mode.moments, zeros),
        exp_avg_scale=tensor(FP32, scales) if quantised else None,
        exp_avg_sq_scale=tensor(FP32, scales) if quantised else None,
        step=torch.tensor(float(step), device=device),
        stream=stream,
    )


def make_segments(mode: Mode, sizes: Sequence[int] = tuple(SIZES), **options: Any) -> list[Segment]:
    """One of each size, each with a history of its own."""
    return [
        make_segment(mode, numel, seed=i, stream=i, step=(0, 3, 40)[i % 3], **options) for i, numel in enumerate(sizes)
    ]


def hypers(count: int) -> list[Hyper]:
    """Different rates and decays in one launch."""
    return [
        Hyper(lr=1e-3 * (1 + i % 3), weight_decay=(0.0, 0.1)[i % 2], eps=1e-8, lr_scale=(1.0, 0.1)[i % 2])
        for i in range(count)
    ]


def clone(segment: Segment, device: str | None = None) -> Segment:
    """A copy that shares no memory."""
    changes = {
        item.name: value.detach().clone().to(device or value.device)
        for item in fields(segment)
        if isinstance(value := getattr(segment, item.name), Tensor)
    }
    return replace(segment, **changes)


def table_of(segments: Sequence[Segment], *, seed: int = 5) -> SegmentTable:
    """A launch over ``segments``."""
    return SegmentTable(segments, hypers(len(segments)), seed=seed)


def new_gradients(segments: Sequence[Segment], others: Sequence[Segment], step: int) -> None:
    """The same fresh gradients for both lists, in place."""
    draw = torch.Generator().manual_seed(step)
    for segment, other in zip(segments, others, strict=True):
        fresh = 0.1 * torch.randn(segment.numel, generator=draw)
        segment.grad.copy_(fresh)
        other.grad.copy_(fresh)


def ulps(first: Tensor, second: Tensor) -> Tensor:
    """Distance in units of the last place, elementwise, of two tensors of one dtype."""
    if first.dtype in (torch.int8, torch.uint8):
        return (first.int() - second.int()).abs()
    kind = {2: torch.int16, 4: torch.int32}[first.dtype.itemsize]
    a, b = first.contiguous().view(kind).long(), second.contiguous().view(kind).long()
    half = 1 << (8 * first.dtype.itemsize - 1)
    a, b = (torch.where(x < 0, -half - x, x) for x in (a, b))
    return (a - b).abs()
