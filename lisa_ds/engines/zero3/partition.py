"""Fills a parameter's partition on this rank, without communication."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor


def is_plain(parameter: Any) -> bool:
    """Whether ``parameter`` is one partition on each rank, in memory and in its own dtype: not hpZ, NVMe or quantised."""
    if getattr(parameter, "ds_status", None) is not ZeroParamStatus.NOT_AVAILABLE:
        return False
    partition = parameter.ds_tensor
    return (
        partition.final_location is None
        and not hasattr(partition, "ds_quant_scale")
        and getattr(parameter, "ds_secondary_tensor", None) is None
        and partition.numel() == partition.ds_numel
    )


@torch.no_grad()
def fill(parameter: Any, read_into: Callable[[Tensor, int], None]) -> None:
    """Have ``read_into`` write this rank's elements of ``parameter``; what pads the last partition becomes zero.

    Args:
        parameter: Partitioned, see :func:`is_plain`.
        read_into: Given a flat tensor, and the index in the whole parameter of its first element, fills it.
    """
    partition, count = parameter.ds_tensor, own_elements(parameter)
    if count:
        read_into(partition.narrow(0, 0, count), partition.ds_numel * parameter.ds_zero_partition_rank)
    partition[count:].zero_()


def own_elements(parameter: Any) -> int:
    """Number of elements of ``parameter`` in this rank's partition; padding follows them."""
    size: int = parameter.ds_tensor.ds_numel
    return max(0, min(size, parameter.ds_numel - size * parameter.ds_zero_partition_rank))
