"""Bytes of all tensors that are alive, followed operation by operation: what a planner's peaks are held to."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def _adds_weight_gradients(args: tuple[Any, ...]) -> bool:
    """Whether autograd adds the two gradients of a tied weight: in place, but for a mode like this one looking on."""
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and all(isinstance(a, Tensor) and a.dim() == 2 for a in args) and args[0].shape == args[1].shape


class LiveBytes(TorchDispatchMode):
    """Counts the storages of every tensor that an operation returns until they are freed.

    Temporaries inside of an operation and buffers of the communication library are not tensors here, and not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._known: dict[int, weakref.finalize] = {}
        self._phase = ""
        self._lock = threading.RLock()  # the communication library's thread may be the one that frees a tensor

    def adopt(self) -> None:
        """Count what was alive before: tensors of every kind that Python knows of."""
        gc.collect()
        for thing in gc.get_objects():
            if isinstance(thing, Tensor):
                self._see(thing)
                for extra in ("ds_tensor", "grad"):
                    self._see(getattr(thing, extra, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and _adds_weight_gradients(args):
            return args[0].add_(args[1])
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self._see(value)
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peak of what happens inside under ``name``."""
        self._phase, self.peaks[name] = name, max(self.now, self.peaks.get(name, 0))
        try:
            yield
        finally:
            self._phase = ""

    def _see(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
        key = id(storage)
        with self._lock:
            if key in self._known:
                return
            size = storage.nbytes()
            self.now += size
            if self._phase and self.now > self.peaks[self._phase]:
                self.peaks[self._phase] = self.now
                self.at_peak()
            self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def at_peak(self) -> None:
        """Called at each new peak; to find out what it is made of."""

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            self.now -= size
            self._known.pop(key, None)
