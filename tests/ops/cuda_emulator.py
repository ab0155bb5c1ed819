"""The CUDA kernels' source, and a library in which the CPU plays the GPU that runs it; with mistakes to put into it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from lisa_ds.ops import build, cuda


def source() -> str:
    return (build.sources() / "cuda" / "masked_adamw.cu").read_text()


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
"""Reads, but no writes, of what lies behind the end. Also compiled for a GPU, for compute-sanitizer (tests/gpu/test_sanitizer.py)."""

MISTAKES = {
    "no decay": ("weight = weight * c.decay - c.rate *", "weight = weight - c.rate *"),
    "no bias correction": ("c.rate = hyper[LR] / correction1;", "c.rate = hyper[LR];"),
    "one step for all": ("at<const float>(span.row, STEP, 0)", "at<const float>(launch.addresses, STEP, 0)"),
    "first segment's rates": ("launch.hyper + span.segment * kHyperColumns", "launch.hyper"),
    "no barrier": ("__syncthreads();\n  const Coefficients& c", "const Coefficients& c"),
    "wrong sign without moments": ("quotient = gradient / (fabsf", "quotient = -gradient / (fabsf"),
    "no magnitude without moments": ("(fabsf(gradient) + c.eps)", "(gradient + c.eps)"),
}

WITHOUT_MOMENTS, WITH_MOMENTS = ("none_master", "none_sr"), ("fp32", "mixed", "sr_fp32_moments", "int8_master")

SPARED = {
    "no bias correction": WITHOUT_MOMENTS,
    "one step for all": ("none_master",),  # which has neither moments to correct nor anything to round at random
    "wrong sign without moments": WITH_MOMENTS,
    "no magnitude without moments": WITH_MOMENTS,
}
"""Modes that do not have what a mistake is about."""
