"""Reports in words which kernels a machine can run; for `lisa-ds ops`."""

from __future__ import annotations

import torch

from lisa_ds.ops import build, cpu
from lisa_ds.ops.dispatch import BACKENDS, Backend, default_backend, unavailable

_WHAT: dict[Backend, str] = {
    "reference": "plain torch, any device",
    "cpu": "C++, CPU",
    "triton": "Triton, NVIDIA and AMD GPUs",
    "cuda": "CUDA C++, NVIDIA GPUs",
}


def lines(*, build: bool) -> list[str]:
    """A line for each backend, and the backend that is used on each kind of device.

    Args:
        build: Compile what is not compiled yet; otherwise that is only reported.
    """
    found = []
    for backend in BACKENDS:
        state, detail = _state(backend, may_build=build)
        found.append(f"{backend:10} {state:14} {_WHAT[backend]}" + (f": {detail}" if detail else ""))
    found.append("")
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            found.append("tensors on a GPU: there is none here")
        elif device == "cpu" and not build and _not_compiled("cpu"):
            found.append("tensors on the CPU: cpu, once it is compiled")
        else:
            name = "a GPU" if device == "cuda" else "the CPU"
            found.append(f"tensors on {name}: {default_backend(device)}")
    return found


def _state(backend: Backend, *, may_build: bool) -> tuple[str, str]:
    compiled = backend in ("cpu", "cuda")
    if compiled and not may_build and _not_compiled(backend):
        missing = build.unbuildable("cpu" if backend == "cpu" else "cuda")
        if missing is not None:
            return "not available", missing
        if backend == "cpu" or torch.cuda.is_available():
            return "not compiled", "compiled at first use, or by `lisa-ds ops --build`"
    reason = unavailable(backend)
    if reason is not None:
        return "not available", reason
    return "available", f"using {cpu.level()}" if backend == "cpu" else ""


def _not_compiled(backend: Backend) -> bool:
    kind: build.Kind = "cpu" if backend == "cpu" else "cuda"
    return build.compiled(kind) is None
