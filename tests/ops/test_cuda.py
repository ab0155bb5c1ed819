"""The CUDA kernels where there is no GPU: what nvcc makes of them, and what their library says."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lisa_ds.ops import build, cuda
from tests.ops import sass
from tests.ops.adamw_cases import MODES, make_segments, table_of
from tests.ops.cuda_emulator import source

pytestmark = pytest.mark.skipif(
    build.unbuildable("cuda") is not None, reason=f"the CUDA kernels cannot be built here: {build.unbuildable('cuda')}"
)

ARCHITECTURES = tuple(int(code) for code in build.CUDA_ARCHITECTURES)

# ---- machine code ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture."""

    arch: int
    grad: str
    weight: str
    moments: str
    """Empty for the sum of squares; "none" where none are kept."""
    has_master: bool
    code: sass.Compiled

    @property
    def least_wide_loads(self) -> int:
        """128-bit loads that a thread makes of a whole block at the least."""
        if not self.moments:
            return 2
        if self.moments == "int8":
            return 3
        if self.moments == "none":  # the master, and the gradient where it is as wide
            return 4 if self.grad == "fp32" and self.has_master else 2
        return 6 if self.has_master else 4


def kernels_of(binary: Path) -> list[Kernel]:
    """Every kernel of a library or a fat binary, read by cuobjdump and nvdisasm."""
    usage = sass._run("cuobjdump", "--dump-resource-usage", str(binary))
    listing = sass._run("cuobjdump", "-sass", str(binary))
    registers: dict[tuple[int, str], tuple[int, int, int]] = {}
    for arch, text in by_architecture(usage):
        for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text):
            reg, stack, local = map(int, numbers)
            registers[arch, name] = reg, stack, local
    kernels = []
    for arch, text in by_architecture(listing):
        for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", text, re.S):
            blocks = sass._basic_blocks(with_labels(body))
            everything = sum((block.accesses for block in blocks.values()), Counter[str]())
            spills = sum(n for opcode, n in everything.items() if opcode.startswith(("LDL", "STL")))
            code = sass.Compiled(*registers[arch, name], spills, sass._wide_path(blocks), everything)
            kernels.append(Kernel(arch, *types_of(name), code))
    return kernels


def by_architecture(text: str) -> list[tuple[int, str]]:
    parts = re.split(r"arch = sm_(\d+)", text)[1:]
    return [(int(arch), body) for arch, body in zip(parts[::2], parts[1::2], strict=True)]


def with_labels(body: str) -> str:
    """A listing whose branches go to addresses, with a label before each address that one goes to."""
    targets = set(re.findall(r"BRA(?:\.\w+)*\s+(?:!?UP?\w+,\s*|!?P\d,\s*)*(0x[0-9a-f]+)", body))
    lines = []
    for line in body.splitlines():
        address = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+\S", line)
        if address and hex(int(address[1], 16)) in targets:
            lines.append(f".L_{hex(int(address[1], 16))}:")
        lines.append(re.sub(r"(BRA.*?)(0x[0-9a-f]+) ;.*", r"\1`(.L_\2) ;", line))
    return "\n".join(lines)


def types_of(name: str) -> tuple[str, str, str, bool]:
    """Gradient, weight, moments and whether there is a master, from a mangled name."""
    argument = r"(6__half|13__nv_bfloat16|NS_4NoneE|S\d_|[fa])"
    found = re.search(rf"masked_adamwI{argument}{argument}{argument}Lb([01])E", name)
    norm = re.search(rf"sum_of_squaresI{argument}E", name)
    assert found or norm, name
    raw = found.groups()[:3] if found else (norm[1],) if norm else ()
    known = {"f": "fp32", "a": "int8", "6__half": "fp16", "13__nv_bfloat16": "bf16", "NS_4NoneE": "none"}
    classes = [known[argument] for argument in raw if len(argument) > 3]
    types = [known[a] if a in known else classes[int(a[1]) - 1] for a in raw]  # S1_: the first class named before
    return (types[0], types[1], types[2], found[4] == "1") if found else (types[0], "", "", False)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Those of the library that would be loaded here; its compilation is kept in the cache."""
    return kernels_of(build.library("cuda"))


def test_every_layout_has_a_kernel_for_every_architecture(kernels: list[Kernel]) -> None:
    types = ("fp32", "bf16", "fp16")
    expected = {(g, w, m, True) for g in types for w in (*types, "none") for m in ("fp32", "int8", "none")}
    expected |= {(g, "bf16", m, False) for g in types for m in ("fp32", "bf16", "int8", "none")}
    expected |= {(g, "", "", False) for g in types}
    for arch in ARCHITECTURES:
        found = [(k.grad, k.weight, k.moments, k.has_master) for k in kernels if k.arch == arch]
        assert len(found) == len(expected)
        assert set(found) == expected


def refused(kernels: list[Kernel]) -> list[Kernel]:
    """Kernels that spill, keep something in local memory or need more than 64 registers."""
    return [k for k in kernels if (k.code.stack, k.code.local, k.code.spills) != (0, 0, 0) or k.code.registers > 64]


def test_no_kernel_spills_or_needs_more_than_64_registers(kernels: list[Kernel]) -> None:
    assert refused(kernels) == []


def test_whole_blocks_are_read_and_written_in_wide_words(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        accesses = kernel.code.accesses
        loads = sum(n for opcode, n in accesses.items() if opcode.startswith("LDG") and opcode.endswith(".128"))
        assert loads >= kernel.least_wide_loads, kernel
        elements = {op for op in accesses if re.search(r"\.[US](8|16)$", op)}
        assert elements == set(), kernel
        tensors = {"": 0, "none": 1}.get(kernel.moments, 3) + (kernel.has_master and kernel.weight != "none")
        stores = kernel.code.all_accesses.items()
        assert sum(n for op, n in stores if op.startswith("STG") and op.endswith((".64", ".128"))) >= tensors, kernel
        # The scales of quantisation blocks, in two rounds at the most.
        narrow = sum(n for op, n in accesses.items() if op.startswith("STG") and not op.endswith((".64", ".128")))
        assert narrow <= (4 if kernel.moments == "int8" else 0), kernel


@pytest.mark.more
def test_with_half_the_registers_the_check_fails(tmp_path: Path) -> None:
    """Control: the same kernels, told to leave room for twice as many threads."""
    cramped = tmp_path / "cramped.cu"
    assert source().count("1024 / threads)") == 1
    cramped.write_text(source().replace("1024 / threads)", "2048 / threads)"))
    binary = tmp_path / "cramped.fatbin"
    flags = ["-O3", "-std=c++17", "-fatbin", "-gencode", "arch=compute_90,code=sm_90"]
    subprocess.run([str(build.compiler("cuda")), *flags, "-o", str(binary), str(cramped)], check=True)
    found = kernels_of(binary)
    assert len(refused(found)) > len(found) // 2
    assert any(kernel.code.spills for kernel in found)


# ---- the library -------------------------------------------------------------------------------------------------


def test_it_loads_without_a_gpu_and_an_empty_launch_succeeds() -> None:
    library = cuda.load()
    assert library.lisa_ds_masked_adamw(None, None, None, 0, None, None, 0, -1, 1, 0, None) == 0
    assert library.lisa_ds_sum_of_squares(None, None, 0, None, 1, None) == 0


def test_types_that_no_kernel_takes_are_refused() -> None:
    library = cuda.load()
    for types in ((3, -1, 1, 0), (0, 3, 1, 0), (0, 2, 0, 0), (0, 1, 1, 1), (0, 1, 1, 4), (0, 0, 0, 3)):
        status = library.lisa_ds_masked_adamw(None, None, None, 1, None, None, *types, None)
        assert cuda._message(status) == "CUDA error 1: invalid argument"
    assert library.lisa_ds_sum_of_squares(None, None, 2**31, None, 1, None) == 1  # more blocks than a grid has


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_driver_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.available() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = cuda.available()
    assert reason is not None
    assert re.match(r"CUDA error \d+: (CUDA driver version is insufficient|no CUDA-capable device)", reason)
    with pytest.raises(RuntimeError, match="masked AdamW: CUDA error"):
        cuda._check(cuda.load().lisa_ds_sum_of_squares(None, None, 1, None, 1, None))


def test_a_library_that_cannot_be_built_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(kind: str) -> Path:
        raise build.BuildError("nvcc was not found")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "library", library)
    cuda.load.cache_clear()
    try:
        assert cuda.available() == "nvcc was not found"
    finally:
        cuda.load.cache_clear()


def test_scalars_of_another_type_are_refused() -> None:
    table = table_of(make_segments(MODES[0], (8,)))
    with pytest.raises(ValueError, match=r"found_inf: should be float32 on cpu, got torch.float64 on cpu"):
        cuda.masked_adamw_(table, table.one, torch.zeros((), dtype=torch.float64))
