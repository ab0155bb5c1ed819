"""Masked AdamW as Triton kernels, for NVIDIA and AMD GPUs; on CPU tensors under ``TRITON_INTERPRET=1``, for tests.

Note on vector width.
    Addresses come from a table, so the compiler does not know their alignment. A hint (``tl.multiple_of``) gives it for
    whole blocks of aligned segments, which are then read in 128-bit words. A hint applies to a value wherever it is
    used, so the pointers of that branch are separate values; the other branch, for the ends of segments and for
    unaligned ones, uses pointers without a hint.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_ds.ops import segments
from lisa_ds.ops.segments import SegmentTable

_INTERPRETED: bool = triton.knobs.runtime.interpret
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_BLOCK = tl.constexpr(segments.BLOCK)
_QUANT_BLOCK = tl.constexpr(segments.QUANT_BLOCK)
_ADDRESS_COLUMNS = tl.constexpr(segments.ADDRESS_COLUMNS)
_HYPER_COLUMNS = tl.constexpr(segments.HYPER_COLUMNS)
_WEIGHT, _GRAD, _MASTER = (tl.constexpr(column) for column in (segments.WEIGHT, segments.GRAD, segments.MASTER))
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(segments.EXP_AVG), tl.constexpr(segments.EXP_AVG_SQ)
_EXP_AVG_SCALE, _EXP_AVG_SQ_SCALE = tl.constexpr(segments.EXP_AVG_SCALE), tl.constexpr(segments.EXP_AVG_SQ_SCALE)
_STEP, _NUMEL, _FIRST_BLOCK = (tl.constexpr(column) for column in (segments.STEP, segments.NUMEL, segments.FIRST_BLOCK))
_ALIGNED, _SEED = tl.constexpr(segments.ALIGNED), tl.constexpr(segments.SEED)
_LR, _WEIGHT_DECAY, _EPS = (tl.constexpr(column) for column in (segments.LR, segments.WEIGHT_DECAY, segments.EPS))
_BETA2 = tl.constexpr(segments.BETA2)
_ONE_MINUS_BETA1, _ONE_MINUS_BETA2 = (
    tl.constexpr(segments.ONE_MINUS_BETA1),
    tl.constexpr(segments.ONE_MINUS_BETA2),
)
_LOG_BETA1, _LOG_BETA2 = tl.constexpr(segments.LOG_BETA1), tl.constexpr(segments.LOG_BETA2)


def available() -> str | None:
    """None, or why the kernels cannot be used."""
    if _INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def masked_adamw_(table: SegmentTable, factor: Tensor, found_inf: Tensor) -> None:
    """Update every segment; see :func:`lisa_ds.ops.masked_adamw_`."""
    if table.num_blocks == 0:
        return
    on_amd = torch.version.hip is not None
    with _on(table.device):
        _masked_adamw[(table.num_blocks,)](
            table.addresses,
            table.hyper,
            table.block_segment,
            factor,
            found_inf,
            **constants(table.layout, on_amd=on_amd),
            num_warps=num_warps(table.layout, on_amd=on_amd),
            enable_fp_fusion=True,
        )


def sum_of_squares(table: SegmentTable) -> Tensor:
    """Sum of the squares of all gradients of the table, float64: ``()``. Two stages, each in a fixed order."""
    partial = torch.zeros(table.num_blocks, dtype=torch.float32, device=table.device)
    if table.num_blocks:
        with _on(table.device):
            _sum_of_squares[(table.num_blocks,)](
                table.addresses, table.block_segment, partial, GRAD=_TYPES[table.layout.grad], num_warps=8
            )
    return partial.sum(dtype=torch.float64)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` the current one: Triton launches there, wherever the tensors are."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def num_warps(layout: segments.Layout, *, on_amd: bool) -> int:
    """Warps of a block: enough that registers suffice, and that a thread's part of a tile is 128 bits wide."""
    return 4 if on_amd or layout.moments == "int8" else 8


def constants(layout: segments.Layout, *, on_amd: bool) -> dict[str, object]:
    """The kernel's compile-time arguments for ``layout``."""
    threads = num_warps(layout, on_amd=on_amd) * (64 if on_amd else 32)
    # Elements of a thread at a time: 4 of fp32 are 128 bits; 8 where 16-bit and 8-bit numbers prevail.
    each = 4 if layout.has_master and layout.moments in ("fp32", "none") else 8
    return {
        "GRAD": _TYPES[layout.grad],
        "WEIGHT": _TYPES[layout.weight] if layout.weight is not None else None,
        "HAS_MASTER": layout.has_master,
        "MOMENTS": layout.moments,
        "TILE": min(each * threads, segments.BLOCK),
        # Its casts to bfloat16 cut off instead of rounding.
        "ROUND_EXPLICITLY": _INTERPRETED,
    }


@triton.jit
def _masked_adamw(
    addresses,
    hyper,
    block_segment,
    factor_at,
    found_inf_at,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    MOMENTS: tl.constexpr,
    TILE: tl.constexpr,
    ROUND_EXPLICITLY: tl.constexpr,
):
    """Update one block of one segment."""
    block = tl.program_id(0)
    if tl.load(found_inf_at) == 0.0:
        segment = tl.load(block_segment + block)
        row = addresses + segment * _ADDRESS_COLUMNS
        start = (block - tl.load(row + _FIRST_BLOCK)) * _BLOCK  # 64 bits, as the columns are
        left = tl.load(row + _NUMEL) - start
        h = hyper + segment * _HYPER_COLUMNS
        step = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.float32)))
        seed = tl.load(row + _SEED)
        factor = tl.load(factor_at)
        lr = tl.load(h + _LR)
        decay = 1.0 - lr * tl.load(h + _WEIGHT_DECAY)
        if MOMENTS == "none":
            rate, root = lr, 1.0
        else:
            rate = lr / _correction(step, tl.load(h + _LOG_BETA1))
            root = 1.0 / tl.sqrt(_correction(step, tl.load(h + _LOG_BETA2)))
        beta2, eps = tl.load(h + _BETA2), tl.load(h + _EPS)
        new1, new2 = tl.load(h + _ONE_MINUS_BETA1), tl.load(h + _ONE_MINUS_BETA2)
        weight, grad, master = tl.load(row + _WEIGHT), tl.load(row + _GRAD), tl.load(row + _MASTER)
        first, second = tl.load(row + _EXP_AVG), tl.load(row + _EXP_AVG_SQ)
        if (left >= _BLOCK) & (tl.load(row + _ALIGNED) != 0):
            for tile in tl.static_range(0, _BLOCK, TILE):
                if MOMENTS == "int8":
                    rows = tl.arange(0, TILE // _QUANT_BLOCK)
                    i = tile + rows[:, None] * _QUANT_BLOCK + tl.arange(0, _QUANT_BLOCK)[None, :]
                    _step_quantised(
                        *(row, weight, grad, master, first, second, start, i, tile // _QUANT_BLOCK + rows, left),
                        *(step, seed),
                        *(factor, beta2, new1, new2, decay, rate, root, eps),
                        *(GRAD, WEIGHT, HAS_MASTER, False, ROUND_EXPLICITLY),
                    )
                else:
                    _step(
                        *(weight, grad, master, first, second, start, tile + tl.arange(0, TILE), left, step, seed),
                        *(factor, beta2, new1, new2, decay, rate, root, eps),
                        *(GRAD, WEIGHT, HAS_MASTER, MOMENTS, False, ROUND_EXPLICITLY),
                    )
        else:
            end = tl.minimum(left, _BLOCK).to(tl.int32)
            for tile in tl.range(0, end, _QUANT_BLOCK):
                if MOMENTS == "int8":
                    rows = tile // _QUANT_BLOCK + tl.arange(0, 1)
                    i = tile + tl.arange(0, _QUANT_BLOCK)[None, :]
                    _step_quantised(
                        *(row, weight, grad, master, first, second, start, i, rows, left, step, seed),
                        *(factor, beta2, new1, new2, decay, rate, root, eps),
                        *(GRAD, WEIGHT, HAS_MASTER, True, ROUND_EXPLICITLY),
                    )
                else:
                    _step(
                        *(
                            weight,
                            grad,
                            master,
                            first,
                            second,
                            start,
                            tile + tl.arange(0, _QUANT_BLOCK),
                            left,
                            step,
                            seed,
                        ),
                        *(factor, beta2, new1, new2, decay, rate, root, eps),
                        *(GRAD, WEIGHT, HAS_MASTER, MOMENTS, True, ROUND_EXPLICITLY),
                    )


@triton.jit
def _sum_of_squares(addresses, block_segment, partial, GRAD: tl.constexpr):
    """The partial sum of one block."""
    block = tl.program_id(0)
    row = addresses + tl.load(block_segment + block) * _ADDRESS_COLUMNS
    start = (block - tl.load(row + _FIRST_BLOCK)) * _BLOCK
    left = tl.load(row + _NUMEL) - start
    grad = tl.load(row + _GRAD)
    i = tl.arange(0, _BLOCK)
    if (left >= _BLOCK) & (tl.load(row + _ALIGNED) != 0):
        whole = _load(grad, GRAD, start, i, left, False)
        tl.store(partial + block, tl.sum(whole * whole))
    else:
        part = _load(grad, GRAD, start, i, left, True)
        tl.store(partial + block, tl.sum(part * part))


@triton.jit
def _at(address, KIND: tl.constexpr, start, i, MASKED: tl.constexpr):
    """Pointers to elements ``start + i`` of the tensor at ``address``."""
    if MASKED:
        return address.to(tl.pointer_type(KIND)) + start + i
    return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(KIND)), 16) + start + i


@triton.jit
def _load(address, KIND: tl.constexpr, start, i, left, MASKED: tl.constexpr):
    at = _at(address, KIND, start, i, MASKED)
    if MASKED:
        value = tl.load(at, mask=i < left, other=0)
    else:
        value = tl.load(at)
    return value.to(tl.float32)


@triton.jit
def _store(address, KIND: tl.constexpr, start, i, value, left, MASKED: tl.constexpr):
    at = _at(address, KIND, start, i, MASKED)
    if MASKED:
        tl.store(at, value, mask=i < left)
    else:
        tl.store(at, value)


@triton.jit
def _correction(step, log_beta):
    """``1 - beta**step``; near 0 by the series of ``1 - exp(-x)``, where the difference of two numbers near 1 has no digits."""
    x = -step * log_beta  # infinite where beta is 0
    small = tl.minimum(x, 0.25)
    series = 1.0 - small / 2.0 * (1.0 - small / 3.0 * (1.0 - small / 4.0 * (1.0 - small / 5.0 * (1.0 - small / 6.0))))
    return tl.where(x < 0.25, small * series, 1.0 - tl.exp(-x))


@triton.jit
def _adamw(weight, gradient, first, second, factor, beta2, new1, new2, decay, rate, root, eps, EXACT: tl.constexpr):
    """One update. ``EXACT``: IEEE square root and quotient; else good to two last places, in fewer registers."""
    gradient = gradient * factor
    first = first + new1 * (gradient - first)
    second = beta2 * second + new2 * gradient * gradient
    if EXACT:
        quotient = tl.div_rn(first, tl.sqrt_rn(second) * root + eps)
    else:
        quotient = first / (tl.sqrt(second) * root + eps)
    return weight * decay - rate * quotient, first, second


@triton.jit
def _first_step(weight, gradient, factor, decay, rate, eps):
    """One update without moments: those of the first step, corrected, are the gradient and its square."""
    gradient = gradient * factor
    return weight * decay - rate * tl.div_rn(gradient, tl.abs(gradient) + eps)


@triton.jit
def _step(
    weight_at,
    grad_at,
    master_at,
    first_at,
    second_at,
    start,
    i,
    left,
    step,
    seed,
    factor,
    beta2,
    new1,
    new2,
    decay,
    rate,
    root,
    eps,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    ROUND_EXPLICITLY: tl.constexpr,
):
    """Elements ``start + i`` of a segment with fp32 or bf16 moments, or with none."""
    MOMENT: tl.constexpr = tl.float32 if MOMENTS == "fp32" else tl.bfloat16
    if HAS_MASTER:
        weight = _load(master_at, tl.float32, start, i, left, MASKED)
    else:
        weight = _load(weight_at, WEIGHT, start, i, left, MASKED)
    gradient = _load(grad_at, GRAD, start, i, left, MASKED)
    if MOMENTS == "none":
        weight = _first_step(weight, gradient, factor, decay, rate, eps)
    else:
        first = _load(first_at, MOMENT, start, i, left, MASKED)
        second = _load(second_at, MOMENT, start, i, left, MASKED)
        weight, first, second = _adamw(
            weight, gradient, first, second, factor, beta2, new1, new2, decay, rate, root, eps, True
        )
        if MOMENTS == "fp32":
            _store(first_at, MOMENT, start, i, first, left, MASKED)
            _store(second_at, MOMENT, start, i, second, left, MASKED)
        else:
            # To nearest the second moment would stand still: it moves by a thousandth of itself, less than half a last place.
            bits = _random_bits(seed, step, start, i, 1)
            _store(first_at, MOMENT, start, i, _rounded(first, MOMENT, ROUND_EXPLICITLY), left, MASKED)
            _store(second_at, MOMENT, start, i, _rounded_stochastically(second, bits), left, MASKED)
    _keep_weight(weight_at, master_at, weight, start, i, left, step, seed, WEIGHT, HAS_MASTER, MASKED, ROUND_EXPLICITLY)


@triton.jit
def _step_quantised(
    row,
    weight_at,
    grad_at,
    master_at,
    first_at,
    second_at,
    start,
    i,
    rows,
    left,
    step,
    seed,
    factor,
    beta2,
    new1,
    new2,
    decay,
    rate,
    root,
    eps,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    MASKED: tl.constexpr,
    ROUND_EXPLICITLY: tl.constexpr,
):
    """Whole quantisation blocks of a segment with 8-bit moments: elements ``start + i``, ``(rows, 256)``."""
    # These addresses are read here and not with the others: kept in registers all along they would be spilled.
    first_scales = tl.load(row + _EXP_AVG_SCALE).to(tl.pointer_type(tl.float32)) + start // _QUANT_BLOCK + rows
    second_scales = tl.load(row + _EXP_AVG_SQ_SCALE).to(tl.pointer_type(tl.float32)) + start // _QUANT_BLOCK + rows
    first_unit = tl.load(first_scales) * (1.0 / (127.0 * 127.0))
    second_unit = tl.load(second_scales) * (1.0 / (255.0 * 255.0 * 255.0 * 255.0))
    if HAS_MASTER:
        weight = _load(master_at, tl.float32, start, i, left, MASKED)
    else:
        weight = _load(weight_at, WEIGHT, start, i, left, MASKED)
    gradient = _load(grad_at, GRAD, start, i, left, MASKED)
    first_code = _load(first_at, tl.int8, start, i, left, MASKED)
    second_code = _load(second_at, tl.uint8, start, i, left, MASKED)
    first = first_code * tl.abs(first_code) * first_unit[:, None]
    second = second_code * second_code
    second = second * second * second_unit[:, None]
    weight, first, second = _adamw(
        weight, gradient, first, second, factor, beta2, new1, new2, decay, rate, root, eps, False
    )
    _keep_weight(weight_at, master_at, weight, start, i, left, step, seed, WEIGHT, HAS_MASTER, MASKED, ROUND_EXPLICITLY)
    first_largest, second_largest = tl.max(tl.abs(first), axis=1), tl.max(second, axis=1)
    tl.store(first_scales, tl.where(first_largest > 1e-37, first_largest, 0.0))
    tl.store(second_scales, tl.where(second_largest > 1e-37, second_largest, 0.0))
    first_inverse = tl.where(first_largest > 1e-37, 1.0 / first_largest, 0.0)
    second_inverse = tl.where(second_largest > 1e-37, 1.0 / second_largest, 0.0)
    code = tl.sqrt(tl.abs(first) * first_inverse[:, None]) * 127.0
    code = tl.where(first < 0.0, -code, code)
    _store(first_at, tl.int8, start, i, _nearest(code).to(tl.int8), left, MASKED)
    code = tl.maximum(tl.sqrt(tl.sqrt(second * second_inverse[:, None])) * 255.0, 1.0)
    _store(second_at, tl.uint8, start, i, _nearest(code).to(tl.uint8), left, MASKED)


@triton.jit
def _keep_weight(
    weight_at,
    master_at,
    value,
    start,
    i,
    left,
    step,
    seed,
    WEIGHT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    MASKED: tl.constexpr,
    ROUND_EXPLICITLY: tl.constexpr,
):
    if HAS_MASTER:
        _store(master_at, tl.float32, start, i, value, left, MASKED)
        if WEIGHT is not None:
            _store(weight_at, WEIGHT, start, i, _rounded(value, WEIGHT, ROUND_EXPLICITLY), left, MASKED)
    else:
        bits = _random_bits(seed, step, start, i, 0)
        _store(weight_at, WEIGHT, start, i, _rounded_stochastically(value, bits), left, MASKED)


@triton.jit
def _nearest(value):
    """The nearest whole number, ties to even, below 2**22: adding 1.5 * 2**23 rounds."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _rounded(value, KIND: tl.constexpr, ROUND_EXPLICITLY: tl.constexpr):
    """``value`` as ``KIND``, to nearest, ties to even."""
    if ROUND_EXPLICITLY and KIND == tl.bfloat16:
        word = value.to(tl.uint32, bitcast=True)
        word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, word.to(tl.float32, bitcast=True), value)
    return value.to(KIND)


@triton.jit
def _rounded_stochastically(value, bits):
    word = (value.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    return tl.where(value == value, word.to(tl.float32, bitcast=True), float("nan")).to(tl.bfloat16)


@triton.jit
def _mix(word, key):
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ key
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _random_bits(seed, step, start, i, PURPOSE: tl.constexpr):
    """16 bits for each element; the numbers of :func:`lisa_ds.ops.reference.random_bits`."""
    none = (seed & 0).to(tl.uint32)
    begin = _mix((seed & 0xFFFFFFFF).to(tl.uint32) + step.to(tl.int32).to(tl.uint32, bitcast=True) * 0x9E3779B9, none)
    middle = _mix(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ begin, none)
    pair = start // 2  # a block begins at an even place, and never holds both sides of a multiple of 2**32
    middle = middle + ((pair >> 32) & 0xFFFFFFFF).to(tl.uint32) * 0x85EBCA6B
    lane = i.to(tl.uint32)
    word = _mix((pair & 0xFFFFFFFF).to(tl.uint32) + (lane >> 1) + begin, middle)
    return (word >> (((lane & 1) ^ PURPOSE) * 16)) & 0xFFFF
