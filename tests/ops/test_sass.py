"""The Triton kernels as they come out for GPUs that are not here: no spills, few registers, wide accesses."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lisa_ds.ops import triton as room
from lisa_ds.ops.segments import Layout, layout_of
from tests.ops import sass
from tests.ops.adamw_cases import MODES, Mode, make_segment

NVIDIA = (80, 90, 100)
AMD = "gfx942"


def layout(mode: Mode) -> Layout:
    return layout_of(make_segment(mode, 256))


def compiled(mode: Mode, arch: int | str, **changes: object) -> sass.Compiled:
    amd = isinstance(arch, str)
    constants = room.constants(layout(mode), on_amd=amd) | changes
    kernel = sass.compile_kernel(room._masked_adamw, constants, arch, room.num_warps(layout(mode), on_amd=amd))
    return sass.examine_amd(kernel) if amd else sass.examine_nvidia(kernel)


def least_wide_loads(mode: Mode) -> int:
    """128-bit loads that a thread makes of a whole block at the least."""
    if mode.moments == torch.int8:
        return 3
    has_master = mode.master or mode.weight == torch.float32
    if mode.moments is None:  # the master, and the gradient where it is as wide
        return 4 if mode.grad == torch.float32 and has_master else 2
    return 6 if has_master else 4


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_nvidia_kernels_neither_spill_nor_read_by_the_element(mode: Mode, arch: int) -> None:
    found = compiled(mode, arch)
    assert (found.stack, found.local, found.spills) == (0, 0, 0)
    assert found.registers <= 64
    assert found.accesses["LDG.E.128"] >= least_wide_loads(mode), found.accesses
    narrow = {op: n for op, n in found.accesses.items() if op.startswith(("LDG", "STG")) and not is_wide(op)}
    # Two scales for each 256 elements of 8-bit moments, read and written once in each of two tiles; else nothing.
    assert narrow == ({"LDG.E": 4, "STG.E": 4} if mode.moments == torch.int8 else {})


def is_wide(opcode: str) -> bool:
    return opcode.endswith((".64", ".128"))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_amd_kernels_likewise(mode: Mode) -> None:
    found = compiled(mode, AMD)
    assert (found.stack, found.spills) == (0, 0)
    assert found.registers <= 96
    assert sum(n for op, n in found.accesses.items() if op.endswith("load_dwordx4")) >= 2
    if mode.moments != torch.int8:
        assert sum(n for op, n in found.accesses.items() if op.endswith("load_dwordx4")) >= least_wide_loads(mode)
    assert sum(n for op, n in found.accesses.items() if op.endswith("store_dwordx4")) >= 1 or "int8" in mode.name


@pytest.mark.parametrize("arch", [*NVIDIA, AMD])
@pytest.mark.parametrize("grad", [torch.bfloat16, torch.float32], ids=str)
def test_the_norm_reads_in_wide_words(arch: int | str, grad: torch.dtype) -> None:
    kernel = sass.compile_kernel(room._sum_of_squares, {"GRAD": room._TYPES[grad]}, arch)
    found = sass.examine_amd(kernel) if isinstance(arch, str) else sass.examine_nvidia(kernel)
    assert (found.stack, found.spills) == (0, 0)
    assert found.registers <= 64
    wide = "load_dwordx4" if isinstance(arch, str) else "LDG.E.128"
    narrow = "load_dwordx2"
    assert sum(n for op, n in found.accesses.items() if op.endswith((wide, narrow))) >= 1


def test_without_the_hint_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a kernel that is told nothing of alignment reads by the element, and the same count sees it."""
    import triton
    import triton.language as tl

    @triton.jit
    def at(address, KIND: tl.constexpr, start, i, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
        return address.to(tl.pointer_type(KIND)) + start + i

    monkeypatch.setattr(room, "_at", at)
    for kernel in (room._load, room._store, room._masked_adamw, room._step):
        monkeypatch.setattr(kernel, "hash", None)
    mode = next(mode for mode in MODES if mode.name == "mixed")
    found = compiled(mode, 90)
    assert found.all_accesses["LDG.E.128"] == 0


def test_too_large_a_tile_fails_the_register_bound() -> None:
    """Control: with twice the elements a thread holds at once, the bound is passed."""
    mode = next(mode for mode in MODES if mode.name == "int8_master")
    kernel = sass.compile_kernel(room._masked_adamw, room.constants(layout(mode), on_amd=False) | {"TILE": 2048}, 90, 4)
    assert sass.examine_nvidia(kernel).registers > 64


def test_the_wide_path_is_told_from_the_other() -> None:
    """The reader of disassemblies itself, on a listing of six lines."""
    listing = """
.text:
        /*0000*/                   LDG.E R0, [R2] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.128 R4, [R2] ;
        /*0030*/                   STG.E.128 [R2], R4 ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   LDG.E.U16 R4, [R2] ;
        /*0060*/                   EXIT ;
"""
    blocks = sass._basic_blocks(listing)
    assert sass._wide_path(blocks) == Counter({"LDG.E.128": 1, "STG.E.128": 1})


def test_constants_say_what_a_layout_needs() -> None:
    mode: Any = next(mode for mode in MODES if mode.name == "mixed")
    found = room.constants(layout(mode), on_amd=False)
    assert found["TILE"] == 1024
    assert found["HAS_MASTER"] is True
    assert not found["ROUND_EXPLICITLY"]
