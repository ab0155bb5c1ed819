"""Warm start: loads the weights of a checkpoint, from any number of ranks, into an engine that begins a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lisa_ds.engines.common.adapters import rule_of
from lisa_ds.engines.zero3.checkpoint.consolidate import read_weights
from lisa_ds.errors import CheckpointError


@torch.no_grad()
def load_weights(module: nn.Module, directory: Path) -> None:
    """Read every parameter and buffer of ``module`` from a DeepSpeed checkpoint.

    Rank 0 reads, and one parameter at a time is gathered and scattered. DeepSpeed's own way (``load_module_only``, or no
    optimizer states) restores only what was frozen when it was saved, or mixes two tags.

    Args:
        module: The partitioned model.
        directory: One tag's directory.

    Raises:
        CheckpointError: It cannot be read, or is of another model. Nothing has been changed on any rank.
    """
    weights: dict[str, Tensor] = {}
    problem: list[str | None] = [None]
    named: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if dist.get_rank() == 0:
        try:
            weights = read_weights(directory, torch.float32, merges=rule_of(module) is None)
            problem[0] = _mismatch(named, weights, directory)
        except CheckpointError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])
    persistent = module.state_dict().keys()
    for name, tensor in named.items():
        if hasattr(tensor, "ds_id"):
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                if weights:
                    tensor.data.copy_(weights[name])
        elif name in persistent:
            if weights and name in weights:
                tensor.data.copy_(weights[name])
            dist.broadcast(tensor.data, src=0)


def _mismatch(named: dict[str, Any], weights: dict[str, Tensor], directory: Path) -> str | None:
    for name, tensor in named.items():
        if not hasattr(tensor, "ds_id"):
            continue
        if name not in weights:
            return f"{directory}: holds no {name}; it is of another model"
        if weights[name].shape != tensor.ds_shape:
            return (
                f"{directory}: {name} has shape {tuple(weights[name].shape)}, but the model's has {tuple(tensor.ds_shape)}; it is "
                "of another model"
            )
    return None
