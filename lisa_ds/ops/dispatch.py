"""Chooses the backend of a launch among those that the machine can run."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lisa_ds.errors import EngineError
from lisa_ds.ops.segments import SegmentTable

Backend = Literal["reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_log = logging.getLogger(__name__)


class _BackendModule(Protocol):
    """What each backend's module offers."""

    def available(self) -> str | None: ...

    def masked_adamw_(self, table: SegmentTable, factor: Tensor, found_inf: Tensor) -> None: ...

    def sum_of_squares(self, table: SegmentTable) -> Tensor: ...


def masked_adamw_(
    table: SegmentTable,
    *,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """One AdamW step of every segment of ``table``, in one launch; nothing else is read or written.

    ``step`` of each segment is raised by one first. Nothing waits for the device, so that a step can be captured in a CUDA graph.

    Args:
        table: What to update, and its hyperparameters.
        factor: float32, one element on the table's device: what gradients are multiplied by, such as the clip coefficient over
            the loss scale. None for 1.
        found_inf: float32, one element: if not 0, nothing is changed, step counts included. None for 0.
        backend: None for the best that is available on the table's device.

    Raises:
        EngineError: ``backend`` cannot be used here.
        ValueError: It does not work on the table's device.
    """
    module = _room(backend, table.device)
    if found_inf is None:
        torch._foreach_add_(table.steps, 1)
    else:
        # One for each: a single tensor would be read on the host, which a capture forbids and a step should not wait for.
        taken = (found_inf == 0).to(torch.float32)
        torch._foreach_add_(table.steps, [taken.reshape(step.shape) for step in table.steps])
    module.masked_adamw_(table, table.one if factor is None else factor, table.zero if found_inf is None else found_inf)


def sum_of_squares(table: SegmentTable, *, backend: Backend | None = None) -> Tensor:
    """Sum of the squares of all gradients of ``table``, in one read: float64, ``()``, on its device.

    It is not finite if a gradient is not finite, or beyond 1e19 in magnitude. Equal inputs give equal bits.
    """
    return _room(backend, table.device).sum_of_squares(table)


@functools.cache
def unavailable(backend: Backend) -> str | None:
    """Why ``backend`` cannot be used on this machine, or None if it can. Compiles it if need be."""
    return _module(backend).available()


@functools.cache
def default_backend(device_type: str) -> Backend:
    """The best backend for tensors on ``device_type``; warns once where that is the reference."""
    candidates: tuple[Backend, ...] = ("cpu",) if device_type == "cpu" else ("triton", "cuda")
    missing = {candidate: unavailable(candidate) for candidate in candidates}
    for candidate, reason in missing.items():
        if reason is None:
            return candidate
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in missing.items())
    _log.warning("masked AdamW runs as plain torch, several times slower, because no kernel can be used: %s", reasons)
    return "reference"


def _room(backend: Backend | None, device: torch.device) -> _BackendModule:
    chosen = backend or default_backend(device.type)
    if chosen not in BACKENDS:
        raise EngineError(f"backend: should be one of {', '.join(BACKENDS)}, got {chosen!r}")
    if backend is not None and (reason := unavailable(backend)) is not None:
        raise EngineError(f"backend {backend!r} cannot be used here: {reason}")
    if (chosen, device.type) in (("cpu", "cuda"), ("cuda", "cpu")):
        raise ValueError(f"backend {chosen!r} does not take tensors on {device}")
    return _module(chosen)


@functools.cache
def _module(backend: Backend) -> _BackendModule:
    return importlib.import_module(f"lisa_ds.ops.{backend}")
