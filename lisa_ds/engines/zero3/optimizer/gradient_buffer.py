"""The buffer of gradient partitions: as large as what trains; freed at a switch before new state is allocated."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lisa_ds.engines.zero3 import supported
from lisa_ds.engines.zero3.optimizer.missing_gradients import MissingGradientsStage3
from lisa_ds.errors import EngineError


class GradientBufferStage3(MissingGradientsStage3):
    """Stage 3 whose gradient buffer can be freed, and allocated again for other parameters."""

    # The base class is untyped; these are the attributes of it that are set here.
    grad_partitions_flat_buffer: Any
    grad_position: dict[int, list[int]]

    def finish_reductions(self) -> None:
        """Wait for reductions that still write into the buffer.

        Raises:
            EngineError: It holds gradients that no step has used yet.
        """
        if self.micro_step_id or self._epilogue_ran_this_backward:
            raise EngineError(
                "there are gradients that no step has used yet; a switch would lose them: switch after step()"
            )
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()

    def release_gradients(self) -> None:
        """Free the gradient buffer and the gradients in it."""
        getattr(self, supported.GRAD_PARTITIONS).clear()
        self.averaged_gradients = {}
        self._written.clear()
        self.grad_partitions_flat_buffer = None

    def rebuild_gradient_partitions(self) -> None:
        """Allocate a new gradient buffer, with a slice for each parameter of the window."""
        parameters = list(itertools.chain.from_iterable(self.fp16_groups))
        sizes = [parameter.partition_numel() for parameter in parameters]
        # Zeros: padding after the last element of an odd-sized parameter is never written, but enters the norm.
        buffer = self.pinned(torch.zeros(sum(sizes), dtype=self.gradient_accumulation_dtype, device=self.device))
        self.grad_partitions_flat_buffer, slices = buffer, torch.split(buffer, sizes)
        getattr(self, supported.GRAD_PARTITIONS).update(
            (parameter.ds_id, part) for parameter, part in zip(parameters, slices, strict=True)
        )
        self.grad_position = {}
        self.set_grad_positions()
        self._offload_boundary_param_ids.clear()
        if self.offload_optimizer:
            self.norm_for_param_grads = {}
            self.subgroup_to_device = dict.fromkeys(range(len(self.fp16_groups)), "cpu")

    def pinned(self, tensor: Tensor) -> Tensor:
        """``tensor``, of an offloaded optimizer, in pinned memory if the config asks for it."""
        pinned: Tensor = get_accelerator().pin_memory(tensor) if self.offload_optimizer_pin_memory else tensor
        return pinned
