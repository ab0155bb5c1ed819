"""Masked AdamW as CUDA kernels: ``csrc/cuda``, compiled by nvcc and called through its C interface."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from lisa_ds.ops import build
from lisa_ds.ops.segments import MOMENT_CODES, TYPE_CODES, SegmentTable


def available() -> str | None:
    """None, or why the kernels cannot be used. Compiles them if that has not been done on this machine."""
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        library = load()
    except build.BuildError as error:
        return str(error)
    # Of the library's own CUDA runtime: it may be newer than the driver, or hold no code for the device.
    return _message(library.lisa_ds_cuda_status())


def masked_adamw_(table: SegmentTable, factor: Tensor, found_inf: Tensor) -> None:
    """Update every segment; see :func:`lisa_ds.ops.masked_adamw_`."""
    for name, scalar in (("factor", factor), ("found_inf", found_inf)):
        if (
            scalar.dtype != torch.float32 or scalar.device != table.device
        ):  # its address is all that the kernel is given
            raise ValueError(f"{name}: should be float32 on {table.device}, got {scalar.dtype} on {scalar.device}")
    layout = table.layout
    with torch.cuda.device(table.device):
        _check(
            load().lisa_ds_masked_adamw(
                table.addresses.data_ptr(),
                table.hyper.data_ptr(),
                table.block_segment.data_ptr(),
                table.num_blocks,
                factor.data_ptr(),
                found_inf.data_ptr(),
                TYPE_CODES[layout.grad],
                TYPE_CODES[layout.weight],
                layout.has_master,
                MOMENT_CODES[layout.moments],
                torch.cuda.current_stream(table.device).cuda_stream,
            )
        )


def sum_of_squares(table: SegmentTable) -> Tensor:
    """Sum of the squares of all gradients of the table, float64: ``()``. Two stages, each in a fixed order."""
    partials = torch.empty(table.num_blocks, dtype=torch.float64, device=table.device)
    with torch.cuda.device(table.device):
        _check(
            load().lisa_ds_sum_of_squares(
                table.addresses.data_ptr(),
                table.block_segment.data_ptr(),
                table.num_blocks,
                partials.data_ptr(),
                TYPE_CODES[table.layout.grad],
                torch.cuda.current_stream(table.device).cuda_stream,
            )
        )
    return partials.sum()


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled if need be. It loads without a GPU or a driver, but launches nothing there.

    Raises:
        BuildError: It cannot be compiled, or not be loaded.
    """
    return declared(str(build.library("cuda")))


def declared(path: str) -> ctypes.CDLL:
    """The library at ``path`` with the types of its functions.

    Raises:
        BuildError: It cannot be loaded.
    """
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise build.BuildError(f"{path} cannot be loaded: {error}; remove it to have it built again") from error
    pointer, integer, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.lisa_ds_masked_adamw.argtypes = [
        *(pointer, pointer, pointer, count, pointer, pointer),
        *(integer, integer, integer, integer, pointer),
    ]
    library.lisa_ds_sum_of_squares.argtypes = [pointer, pointer, count, pointer, integer, pointer]
    library.lisa_ds_cuda_status.argtypes = []
    library.lisa_ds_cuda_error.argtypes = [integer]
    library.lisa_ds_cuda_error.restype = ctypes.c_char_p
    return library


def _check(status: int) -> None:
    message = _message(status)
    if message is not None:
        raise RuntimeError(f"masked AdamW: {message}")


def _message(status: int) -> str | None:
    if status == 0:
        return None
    text: bytes = load().lisa_ds_cuda_error(status)
    return f"CUDA error {status}: {text.decode()}"
