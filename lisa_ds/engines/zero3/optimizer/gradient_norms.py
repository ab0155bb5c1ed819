"""Squared norms of the gradients of each unit under ZeRO-3, over all ranks, as a step uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lisa_ds.engines.zero3 import supported
from lisa_ds.layers import Unit


def holds_own_parts(optimizer: Any) -> bool:
    """Whether all gradients are partitioned over the same group of ranks, so that squares may simply be summed."""
    first = optimizer.sub_group_process_groups[0]
    return (
        optimizer.model_parallel_group is None
        and all(group is first for group in optimizer.sub_group_process_groups)
        and all(
            getattr(p, "ds_zero_placement_family", "replicated") == "replicated"
            for group in optimizer.fp16_groups
            for p in group
        )
    )


@torch.no_grad()
def unit_squares(
    optimizer: Any, units: Sequence[Unit], norms_of_groups: Callable[[], Sequence[Any]]
) -> tuple[list[Unit], Tensor]:
    """Squared 2-norm of each unit's gradient over all ranks, with the loss scale squared.

    Args:
        optimizer: The window.
        units: The unit of each of its sub-groups.
        norms_of_groups: Stage 3's own norms of them, for tensor parallelism; -1 for one that is not finite. They take
            one all-reduce for each sub-group, instead of one in all.

    Returns:
        The units in their order, and ``(units,)``, float64, on the device that computes.
    """
    order = list(dict.fromkeys(units))
    device = get_accelerator().current_device_name()
    if holds_own_parts(optimizer):
        squares = [_own_squares(optimizer, group, device) for group in optimizer.fp16_groups]
    else:
        norms = [torch.as_tensor(norm).to(device, torch.float64) for norm in norms_of_groups()]
        squares = [torch.where(norm < 0, float("inf"), norm).square() for norm in norms]
    of_units = torch.stack(
        [torch.stack([s for s, unit in zip(squares, units, strict=True) if unit == wanted]).sum() for wanted in order]
    )
    if holds_own_parts(optimizer):
        dist.all_reduce(of_units, group=optimizer.sub_group_process_groups[0])
    return order, of_units


def _own_squares(optimizer: Any, group: Sequence[Any], device: str) -> Tensor:
    if optimizer.offload_optimizer:  # taken when the gradients went to the host, of those that this rank has a part of
        known = optimizer.norm_for_param_grads
        norms = [known[key] for key in map(optimizer.get_param_id, group) if key in known]
        norms = [torch.as_tensor(norm).to(device, torch.float64) for norm in norms]
    else:
        partitions: Mapping[int, Tensor] = getattr(optimizer, supported.GRAD_PARTITIONS)
        norms = list(torch._foreach_norm([partitions[p.ds_id] for p in group], 2, torch.float32))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).double().square().sum()
