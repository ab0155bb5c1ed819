"""Masked AdamW on the CPU: the C++ kernels of ``csrc/cpu``, for AVX-512, AVX2 or any other processor."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lisa_ds.ops import build
from lisa_ds.ops.segments import MOMENT_CODES, TYPE_CODES, SegmentTable


def available() -> str | None:
    """None, or why the kernels cannot be used. Compiles them if that has not been done on this machine."""
    try:
        _load()
    except build.BuildError as error:
        return str(error)
    return None


def level() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``base``. ``LISA_DS_CPU_LEVEL`` asks for a narrower one."""
    name: bytes = _load()
    return name.decode()


def masked_adamw_(table: SegmentTable, factor: Tensor, found_inf: Tensor) -> None:
    """Update every segment; see :func:`lisa_ds.ops.masked_adamw_`."""
    _load()
    if found_inf.item():  # in this process's own memory: nothing to wait for
        return
    layout = table.layout
    torch.ops.lisa_ds.masked_adamw(
        table.addresses,
        table.hyper,
        len(table.numels),
        factor.item(),
        TYPE_CODES[layout.grad],
        TYPE_CODES[layout.weight],
        int(layout.has_master),
        MOMENT_CODES[layout.moments],
        torch.get_num_threads(),
    )


def sum_of_squares(table: SegmentTable) -> Tensor:
    """Sum of the squares of all gradients of the table, float64: ``()``. The number of threads does not change it."""
    _load()
    total = torch.ops.lisa_ds.sum_of_squares(
        table.addresses, len(table.numels), TYPE_CODES[table.layout.grad], torch.get_num_threads()
    )
    return torch.tensor(total, dtype=torch.float64)


def squares_of(tensors: Sequence[Tensor]) -> float:
    """Sum of the squares of all ``tensors``: of one type (bfloat16, float16 or float32), contiguous, on the CPU."""
    _load()
    rows = [[0, tensor.data_ptr(), *[0] * 6, tensor.numel(), *[0] * 3] for tensor in tensors]
    total: float = torch.ops.lisa_ds.sum_of_squares(
        torch.tensor(rows), len(rows), TYPE_CODES[tensors[0].dtype], torch.get_num_threads()
    )
    return total


_loaded: list[bytes] = []  # a second library would register the same operators, which ends the process


@functools.cache
def _load() -> bytes:
    path = build.library("cpu")
    if not _loaded:
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise build.BuildError(f"{path} cannot be loaded: {error}; remove it to have it built again") from error
        library.lisa_ds_cpu_level.restype = ctypes.c_char_p
        _loaded.append(library.lisa_ds_cpu_level())
    return _loaded[0]
