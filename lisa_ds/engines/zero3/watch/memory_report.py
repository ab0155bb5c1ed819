"""Bytes of live model-state tensors on this rank, counted from their storages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lisa_ds.engines.common.storage import storage_bytes
from lisa_ds.engines.zero3.optimizer.window import WindowedStage3
from lisa_ds.engines.zero3.state.count import own_masters, state_bytes
from lisa_ds.memory import Precision
from lisa_ds.optim import StateFormat


def memory_report(optimizer: Any, parameters: Iterable[Any]) -> dict[str, int]:
    """Model-state bytes on this rank, by kind.

    Every storage counts once and whole, so that a view which keeps a larger buffer alive is seen.

    Args:
        optimizer: The :class:`~lisa_ds.engines.zero3.optimizer.window.WindowedStage3`, or a stock ZeRO-3 optimizer.
        parameters: All parameters of the model, partitioned.

    Returns:
        ``weights`` (the partitions, sampled and frozen, with hpZ's second ones), ``gradients`` (partitions; with CPU offload also their fp32 copy),
        ``master``, ``exp_avg``, ``exp_avg_sq`` (with the scales of 8-bit moments), ``parked_host``, ``parked_nvme`` (state of
        frozen layers) and ``buckets`` (the reduce buckets), in bytes.
    """
    masters = own_masters(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)
    if isinstance(optimizer, WindowedStage3):
        state = optimizer.unit_state.bytes()
    else:
        state = {**state_bytes(masters, optimizer.optimizer.state.values()), "parked_host": 0, "parked_nvme": 0}
    return {
        "weights": storage_bytes(
            part for p in parameters for part in (p.ds_tensor, getattr(p, "ds_secondary_tensor", None))
        ),
        "gradients": storage_bytes([optimizer.grad_partitions_flat_buffer, *(master.grad for master in masters)]),
        **state,
        "buckets": storage_bytes(bucket.buffer for bucket in optimizer.ipg_buckets.values()),
    }


def precision(engine: Any) -> Precision:
    """Bytes per element of each kind of state in ``engine``, stock or LISA's, for the planner."""
    weight, gradient = engine.get_data_types()
    state_format: StateFormat = getattr(engine, "state_format", StateFormat())
    return Precision(
        weight_bytes=weight.itemsize,
        gradient_bytes=gradient.itemsize,
        master_bytes=4 if state_format.precision == "mixed" else 0,
        moments=state_format.moments_of(weight),
        offload_optimizer=bool(engine.zero_offload_optimizer() and engine.zero_use_cpu_optimizer()),
    )
