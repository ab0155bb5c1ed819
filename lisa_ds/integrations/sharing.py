"""Makes a trainer work with DeepSpeed's AutoTP (tensor parallelism), where several ranks share layers, and so rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from transformers.integrations.deepspeed import deepspeed_config

from lisa_ds.config.deepspeed import autotp_size


def tensor_parallel_size(args: Any) -> int:
    """The tensor-parallel size in a trainer's arguments: ranks that share each layer."""
    plugin = args.deepspeed_plugin
    return 1 if plugin is None else autotp_size(plugin.hf_ds_config.config)


@contextmanager
def loading() -> Iterator[None]:
    """Inside the ``with``, models are loaded as without AutoTP, which splits their layers when the engine is built.

    Transformers refuses to load under ZeRO-3 and AutoTP, because of weights that it would convert while loading.
    """
    fields = deepspeed_config() or {}
    section = fields.pop("tensor_parallel", None)
    try:
        yield
    finally:
        if section is not None:
            fields["tensor_parallel"] = section


def count_rows_once(trainer: Any) -> None:
    """Have ``trainer`` count each held-out row once in its mean, not once for each rank that has seen it.

    Accelerate cuts the last batch to the rows that are left, as if all ranks had rows of their own.
    """
    size = tensor_parallel_size(trainer.args)
    if size == 1:
        return
    accelerator = trainer.accelerator
    stock = accelerator.gather_for_metrics

    def of_each_group(gathered: Tensor) -> Tensor:
        parts = gathered.chunk(accelerator.num_processes)[::size]
        rows = torch.cat(parts)
        left = accelerator.gradient_state.remainder if accelerator.gradient_state.end_of_dataloader else -1
        return rows[:left] if left > 0 else rows

    def gather(data: Any, use_gather_object: bool = False) -> Any:
        if use_gather_object:
            return stock(data, use_gather_object=True)
        return recursively_apply(of_each_group, accelerator.gather(data))

    trainer.gather_function = accelerator.gather_for_metrics = gather  # the trainer goes back to the latter each time
