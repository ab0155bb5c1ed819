"""The CUDA kernels where there is no GPU: what nvcc makes of them, and what they compute when the CPU plays the GPU."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lisa_ds.ops import build, cuda
from tests import ops_runs, sass, test_ops
from tests.adamw_cases import MODES, make_segments, table_of
from tests.isolated import exit_code, run_isolated

pytestmark = pytest.mark.skipif(
    build.unbuildable("cuda") is not None, reason=f"the CUDA kernels cannot be built here: {build.unbuildable('cuda')}"
)

ARCHITECTURES = tuple(int(code) for code in build.CUDA_ARCHITECTURES)
BY_NAME = {mode.name: mode for mode in MODES}


def source() -> str:
    return (build.sources() / "cuda" / "masked_adamw.cu").read_text()


# ---- machine code ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture."""

    arch: int
    grad: str
    weight: str
    moments: str
    """Empty for the sum of squares."""
    has_master: bool
    code: sass.Compiled

    @property
    def least_wide_loads(self) -> int:
        """128-bit loads that a thread makes of a whole block at the least."""
        if not self.moments:
            return 2
        if self.moments == "int8":
            return 3
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
    classes = [known[argument] for argument in raw if argument[0].isdigit()]
    types = [known[a] if a in known else classes[int(a[1]) - 1] for a in raw]  # S1_: the first class named before
    return (types[0], types[1], types[2], found[4] == "1") if found else (types[0], "", "", False)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Those of the library that would be loaded here; its compilation is kept in the cache."""
    return kernels_of(build.library("cuda"))


def test_every_layout_has_a_kernel_for_every_architecture(kernels: list[Kernel]) -> None:
    types = ("fp32", "bf16", "fp16")
    expected = {(g, w, m, True) for g in types for w in (*types, "none") for m in ("fp32", "int8")}
    expected |= {(g, "bf16", m, False) for g in types for m in ("fp32", "bf16", "int8")}
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
        tensors = 0 if not kernel.moments else 3 + (kernel.has_master and kernel.weight != "none")
        stores = kernel.code.all_accesses.items()
        assert sum(n for op, n in stores if op.startswith("STG") and op.endswith((".64", ".128"))) >= tensors, kernel
        # The scales of quantisation blocks, in two rounds at the most.
        narrow = sum(n for op, n in accesses.items() if op.startswith("STG") and not op.endswith((".64", ".128")))
        assert narrow <= (4 if kernel.moments == "int8" else 0), kernel


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
    for types in ((3, -1, 1, 0), (0, 3, 1, 0), (0, 2, 0, 0), (0, 1, 1, 1), (0, 1, 1, 3)):
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


# ---- what they compute -------------------------------------------------------------------------------------------

EMULATOR = r"""
// Runs CUDA kernels on the CPU: the threads of a block take turns, each on a stack of its own, and wait for one another where a GPU's
// would. A function of a whole warp that not all of its threads reach aborts, and so does a barrier.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
using std::isnan;
using std::max;

namespace emulator {
enum State { READY, AT_BARRIER, IN_WARP, DONE };
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state = READY;
  uint64_t word = 0;  // what it brings to its warp
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline struct { unsigned x; } thread, block;

inline void wait(State state) {
  Thread& me = threads[thread.x];
  me.state = state;
  swapcontext(&me.context, &scheduler);
}
// What every thread of the caller's warp has brought.
template <class T, class F> auto in_warp(T value, F f) {
  std::memcpy(&threads[thread.x].word, &value, sizeof(T));
  wait(IN_WARP);
  T lanes[32];
  for (int i = 0; i < 32; ++i) std::memcpy(&lanes[i], &threads[thread.x / 32 * 32 + i].word, sizeof(T));
  wait(IN_WARP);  // nobody brings the next value before all have read this one
  return f(lanes);
}
inline void main() {
  body();
  threads[thread.x].state = DONE;
  swapcontext(&threads[thread.x].context, &scheduler);
}
inline void run_block(unsigned count) {
  if (threads.size() != count) threads = std::vector<Thread>(count);
  for (Thread& t : threads) {
    t.state = READY;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data(), t.context.uc_stack.ss_size = t.stack.size();
    makecontext(&t.context, main, 0);
  }
  const auto all = [](auto begin, auto end, State state) { return std::all_of(begin, end, [=](auto& t) { return t.state == state; }); };
  while (!all(threads.begin(), threads.end(), DONE)) {
    bool moved = false;
    for (unsigned i = count; i-- > 0;) {  // the last one first: what the first one is to provide is missed if nobody waits for it
      if (threads[i].state != READY) continue;
      moved = true, thread.x = i;
      swapcontext(&scheduler, &threads[i].context);
    }
    for (auto warp = threads.begin(); warp != threads.end(); warp += 32) {
      if (all(warp, warp + 32, IN_WARP)) for (auto t = warp; t != warp + 32; ++t) t->state = READY;
    }
    if (all(threads.begin(), threads.end(), AT_BARRIER)) for (Thread& t : threads) t.state = READY;
    if (!moved) std::fprintf(stderr, "threads wait for others that do not come\n"), std::abort();
  }
}
}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
inline void __syncthreads() { emulator::wait(emulator::AT_BARRIER); }
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return emulator::in_warp(value, [](const uint32_t* lanes) { return *std::max_element(lanes, lanes + 32); });
}
inline double __shfl_xor_sync(uint32_t, double value, int distance) {
  return emulator::in_warp(value, [=](const double* lanes) { return lanes[emulator::thread.x % 32 ^ distance]; });
}
template <class To, class From> To bits_of(From value) {
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
inline uint32_t __float_as_uint(float value) { return bits_of<uint32_t>(value); }
inline float __uint_as_float(uint32_t value) { return bits_of<float>(value); }
inline int __float2int_rn(float value) { return isnan(value) ? 0 : static_cast<int>(std::nearbyint(value)); }
inline float __fdividef(float a, float b) { return a / b; }
inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }
template <class T> void __stcs(T* place, T value) { *place = value; }
#include "kernels.cu"
extern "C" cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  for (emulator::block.x = 0; emulator::block.x < grid.x; ++emulator::block.x) {
    emulator::body = [=] { reinterpret_cast<Kernel>(reinterpret_cast<uintptr_t>(kernel))(*static_cast<Launch*>(arguments[0])); };
    emulator::run_block(block.x);
  }
  return cudaSuccess;
}
extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "an error"; }
"""


def emulated(body: Callable[..., Any], library: str, *args: Any) -> Any:
    """``body(*args)`` with CPU tensors for the CUDA backend's, and the emulated kernels in place of the device's."""
    from lisa_ds.ops import dispatch

    patches: dict[Any, dict[str, Any]] = {
        cuda: {"load": functools.cache(lambda: cuda.declared(library))},
        torch.cuda: {
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device: SimpleNamespace(cuda_stream=0),
        },
        dispatch: {
            "_room": lambda backend, device: dispatch._module("reference" if backend == "reference" else "cuda")
        },
    }
    for module, replacements in patches.items():
        for name, value in replacements.items():
            setattr(module, name, value)
    return body(*args)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Compiles the kernels, with a part of their source replaced, into a library that runs them on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")

    @functools.cache
    def library(old: str = "", new: str = "") -> str:
        folder = tmp_path_factory.mktemp("emulator")
        assert not old or source().count(old) == 1, f"{old!r} is not in the source, or not once"
        (folder / "kernels.cu").write_text(source().replace(old, new) if old else source())
        (folder / "emulator.cpp").write_text(EMULATOR)
        # nvcc for its headers' sake: it hands C++ to g++.
        command = [str(build.compiler("cuda")), "-x", "c++", "-std=c++17", "-O1", "-cudart", "none", "-shared"]
        command += ["-Xcompiler", "-fPIC,-fno-strict-aliasing", "-o", "emulator.so", "emulator.cpp"]
        subprocess.run(command, cwd=folder, check=True)
        return str(folder / "emulator.so")

    return library


@pytest.fixture(scope="module")
def measured(emulator: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What tests/test_ops.py asks of every backend."""
    found = run_isolated(emulated, tmp_path_factory.mktemp("measured"), ops_runs.run, emulator(), "cuda")
    return lambda backend: found


@pytest.mark.parametrize("mode", BY_NAME)
def test_they_compute_what_is_specified(measured: Callable[[str], Any], mode: str) -> None:
    if not test_ops.stochastic(mode) and "int8" not in mode:
        test_ops.test_twenty_steps_are_as_close_to_fp64_as_torch(measured, "cuda", mode)
    for check in (
        test_ops.test_one_step_from_the_same_state_is_as_close_to_fp64_as_torch,
        test_ops.test_backends_agree_with_the_specification,
        test_ops.test_frozen_segments_keep_every_byte_even_with_nan_gradients,
        test_ops.test_an_overflow_changes_nothing,
        test_ops.test_gradients_that_are_not_finite_are_told_and_spoil_themselves_alone,
        test_ops.test_the_norm_is_exact_and_repeatable,
    ):
        check(measured, "cuda", mode)


def test_nothing_is_touched_behind_the_end_of_a_tensor(emulator: Callable[..., str], tmp_path: Path) -> None:
    assert run_isolated(emulated, tmp_path, ops_runs.run_at_the_edge, emulator(), "cuda")


def test_offsets_beyond_two_billion(emulator: Callable[..., str], tmp_path: Path) -> None:
    for mode, (same, moved) in run_isolated(emulated, tmp_path, ops_runs.run_far_away, emulator()).items():
        assert same, mode
        assert moved > 290, mode


# ---- mistakes ----------------------------------------------------------------------------------------------------


DROPPED_MASK = {
    "by elements": (
        "for (int i = threadIdx.x; i < span.n; i += threads) {",
        "for (int i = threadIdx.x; i < kBlock; i += threads) {\n"
        "if (i >= span.n) { *reinterpret_cast<const volatile char*>(grad + i); continue; }",
    ),
    "by quantisation blocks": (
        "if (i >= span.n) continue;",
        "if (i >= span.n) { *reinterpret_cast<const volatile char*>(exp_avg + i); continue; }",
    ),
    "of the norm": (
        "for (int i = threadIdx.x; i < span.n; i += kSumThreads) {",
        "for (int i = threadIdx.x; i < kBlock; i += kSumThreads) {\n"
        "if (i >= span.n) { *reinterpret_cast<const volatile char*>(grad + i); continue; }",
    ),
}
"""Reads, but no writes, of what lies behind the end. Also compiled for a GPU, for compute-sanitizer (tests/test_gpu.py)."""

MISTAKES = {
    "no decay": ("weight = weight * c.decay - c.rate *", "weight = weight - c.rate *"),
    "no bias correction": ("c.rate = hyper[LR] / correction1;", "c.rate = hyper[LR];"),
    "one step for all": ("at<const float>(span.row, STEP, 0)", "at<const float>(launch.addresses, STEP, 0)"),
    "first segment's rates": ("launch.hyper + span.segment * kHyperColumns", "launch.hyper"),
    "no barrier": ("__syncthreads();\n  const Coefficients& c", "const Coefficients& c"),
}


@pytest.mark.parametrize("where", DROPPED_MASK)
def test_a_dropped_load_mask_is_seen(emulator: Callable[..., str], tmp_path: Path, where: str) -> None:
    """Control: results do not change, but the process dies of it."""
    library = emulator(*DROPPED_MASK[where])
    code = exit_code(emulated, tmp_path, ops_runs.run_at_the_edge, library, "cuda")
    assert code in (-signal.SIGSEGV, -signal.SIGBUS)


def distances(names: list[str]) -> dict[str, float]:
    """Of weights from the specification's, by mode."""
    found = {name: ops_runs.against_reference("cuda", BY_NAME[name]) for name in names}
    return {name: fields["master" if "master" in fields else "weight"][2] for name, fields in found.items()}


BOUNDS = {"fp32": 2e-6, "mixed": 2e-6, "sr_fp32_moments": 2e-6, "int8_master": 1.5e-4}


def test_the_right_kernel_keeps_the_bounds_below(emulator: Callable[..., str], tmp_path: Path) -> None:
    found = run_isolated(emulated, tmp_path, distances, emulator(), list(BOUNDS))
    assert all(found[mode] <= bound for mode, bound in BOUNDS.items()), found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_kernel_is_seen(emulator: Callable[..., str], tmp_path: Path, mistake: str) -> None:
    """Control: each of these breaks the bounds in every mode."""
    found = run_isolated(emulated, tmp_path, distances, emulator(*MISTAKES[mistake]), list(BOUNDS))
    assert not any(found[mode] <= bound for mode, bound in BOUNDS.items()), found
