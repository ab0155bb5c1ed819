"""Steps on memory that ends at a wall or lies far away; each runs in a process of its own (tests/ops/test_ops.py)."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lisa_ds.ops import Backend, Hyper, Segment, SegmentTable, masked_adamw_, sum_of_squares
from tests.ops import triton_mutants
from tests.ops.adamw_cases import MODES, make_segment, ulps


def run_at_the_edge(backend: Backend, mutant: str = "") -> bool:
    """Every tensor ends where the next page cannot be touched: a read or a write behind its end kills the process."""
    if mutant:
        triton_mutants.install(mutant)
    torch.set_num_threads(1)
    for mode in MODES:
        for numel in (1, 7, 255, 257, 2049):
            segment = make_segment(mode, numel)
            changes = {
                item.name: before_a_wall(value)
                for item in fields(segment)
                if isinstance(value := getattr(segment, item.name), Tensor)
            }
            table = SegmentTable([replace(segment, **changes)], [Hyper()])
            sum_of_squares(table, backend=backend)
            masked_adamw_(table, backend=backend)
    return True


_walls: list[Any] = []


def before_a_wall(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` that ends at a page without permissions."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    _walls.append(memory)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(place + pages), mmap.PAGESIZE, 0) == 0
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    view.copy_(tensor.reshape(-1))
    return view.view(tensor.shape)


def run_far_away() -> dict[str, list[int]]:
    """Places changed by each Triton kernel in a block that begins 2**31 + 4096 elements behind its segment's first."""
    from lisa_ds.ops import segments

    start = 2**31 + 4096
    changed = {}
    for mode in MODES:
        near, far, before = (make_segment(mode, 300, step=3) for _ in range(3))
        table = SegmentTable([far], [Hyper(lr=0.1)])
        masked_adamw_(SegmentTable([near], [Hyper(lr=0.1)]), backend="triton")
        row = table.addresses[0]
        for column, tensor in zip(range(segments.STEP), far.tensors, strict=False):
            if tensor is not None:
                scales = column in (segments.EXP_AVG_SCALE, segments.EXP_AVG_SQ_SCALE)
                row[column] -= start // (segments.QUANT_BLOCK if scales else 1) * tensor.element_size()
        row[segments.NUMEL], row[segments.FIRST_BLOCK] = start + 300, -(start // segments.BLOCK)
        masked_adamw_(table, backend="triton")
        changed[mode.name] = [int(same_step(near, far)), moved(before, far)]
    return changed


def same_step(near: Segment, far: Segment) -> bool:
    """Whether two segments that were equal have taken one step; random numbers depend on the place, the rest does not."""
    if far.exp_avg is None and not (far.master is not None or far.in_place_fp32):
        assert near.weight is not None
        assert far.weight is not None
        return int(ulps(near.weight, far.weight).max()) <= 1
    keys = [key for key in ("master", "exp_avg") if getattr(far, key) is not None]
    return all(torch.equal(getattr(near, key), getattr(far, key)) for key in keys or ["weight"])


def moved(before: Segment, after: Segment) -> int:
    """Weights that a step of 0.1 has changed."""
    assert before.weight is not None
    assert after.weight is not None
    return int((before.weight != after.weight).sum())


def run_across_two_billion() -> dict[str, float]:
    """The C++ kernel over 2**31 + 300 elements, all but the last few thousand of which share one small piece of memory."""
    torch.set_num_threads(2)
    numel, tail = 2**31 + 300, 4096
    piece = 1 << 22  # elements
    arrays = [mapped(numel, piece, tail) for _ in range(4)]
    weight, gradient, *_ = arrays
    gradient[0][-300:] = 1.0
    tensors = [array[1] for array in arrays]
    segment = Segment(
        weight=tensors[0], grad=tensors[1], exp_avg=tensors[2], exp_avg_sq=tensors[3], step=torch.zeros(())
    )
    masked_adamw_(SegmentTable([segment], [Hyper(lr=0.5, weight_decay=0.0)]), backend="cpu")
    return {
        "last": float(weight[0][-300:].max()),
        "last_most": float(weight[0][-300:].min()),
        "before": float(weight[0][:-300].abs().max()),
        "squares": float(sum_of_squares(SegmentTable([segment], [Hyper()]), backend="cpu")),
    }


def mapped(numel: int, piece: int, tail: int) -> tuple[Tensor, Tensor]:
    """fp32 zeros: the last ``tail`` elements with memory of their own, and all ``numel``, of which the rest shares ``piece``."""
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    reads_and_writes, shared, fixed, anonymous, lazily = 3, 1, 0x10, 0x20, 0x4000
    size = -(-numel * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
    base = libc.mmap(None, size, reads_and_writes, shared | anonymous | lazily, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value)
    file = os.memfd_create("piece")
    os.ftruncate(file, piece * 4)
    own = tail * 4 // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
    for offset in range(0, size - own, piece * 4):
        length = min(piece * 4, size - own - offset)
        assert libc.mmap(base + offset, length, reads_and_writes, shared | fixed, file, 0) == base + offset
    whole = torch.frombuffer((ctypes.c_float * numel).from_address(base), dtype=torch.float32)
    return whole[-tail:], whole
