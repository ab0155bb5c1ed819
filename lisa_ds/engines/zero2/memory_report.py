"""Bytes of live model state under stock ZeRO-2, counted from storages inside its step."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from lisa_ds.engines.common.storage import storage_bytes


def is_zero2(optimizer: Any) -> bool:
    """Whether an engine's optimizer is ZeRO-2's."""
    return isinstance(optimizer, DeepSpeedZeroOptimizer)


class StepWatch:
    """Counts gradients at the first step, when all of them are there; everything else can be counted at any time.

    Args:
        optimizer: ZeRO-2's, whose ``step`` is wrapped.
        parameters: All parameters of the model.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        self._gradients = 0
        stock = optimizer.step

        @functools.wraps(stock)
        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._gradients:  # all steps have the same
                self._gradients = storage_bytes(_gradients(optimizer, self._parameters))
            return stock(*args, **kwargs)

        optimizer.step = step

    def bytes(self) -> dict[str, int]:
        """Bytes by kind, with the keys of ``engine.memory_report()``."""
        optimizer = self._optimizer
        masters = optimizer.single_partition_of_fp32_groups
        states = [optimizer.optimizer.state.get(master) or {} for master in masters]
        own = {flat.untyped_storage().data_ptr() for flat in optimizer.bit16_groups_flat}
        return {
            "weights": storage_bytes(self._parameters),
            "gradients": self._gradients,
            "master": storage_bytes(m for m in masters if m.untyped_storage().data_ptr() not in own),
            "exp_avg": storage_bytes(state.get("exp_avg") for state in states),
            "exp_avg_sq": storage_bytes(state.get("exp_avg_sq") for state in states),
            "parked_host": 0,
            "parked_nvme": 0,
            "buckets": storage_bytes(part for bucket in optimizer.ipg_buckets.values() for part in bucket.buffer),
        }


def _gradients(optimizer: Any, parameters: Iterable[Tensor]) -> Iterator[Tensor | None]:
    yield from (parameter.grad for parameter in parameters)
    yield from (getattr(parameter, "grad_accum", None) for parameter in parameters)
    yield from (master.grad for master in optimizer.single_partition_of_fp32_groups)
    for parts in optimizer.averaged_gradients.values():
        yield from parts if isinstance(parts, (list, tuple)) else [parts] if torch.is_tensor(parts) else ()
