"""The optimizer step as one fused launch, in place of Stage 3's cast, unscale, step and copy of each sub-group.

Note on the optimizer's state.
    The optimizer that the engine was given still holds the parameter groups and the state, under
    ``torch.optim.AdamW``'s names: learning-rate schedules, checkpoints and DeepSpeed's own accessors find everything in
    its usual place. Only the arithmetic is done here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage3 import OPTIMIZER_STEP_TIMER
from torch import Tensor

from lisa_ds.config.formats import QUANT_BLOCK
from lisa_ds.engines.zero3 import parallel, supported
from lisa_ds.engines.zero3.optimizer.gradient_norms import holds_own_parts
from lisa_ds.engines.zero3.optimizer.missing_gradients import STEPS
from lisa_ds.engines.zero3.optimizer.window import WindowedStage3
from lisa_ds.errors import EngineError
from lisa_ds.layers import Unit
from lisa_ds.ops import Hyper, Segment, SegmentTable, default_backend, masked_adamw_, sum_of_squares
from lisa_ds.ops.reference import dequantise_signed, dequantise_unsigned
from lisa_ds.optim import StateFormat


class FusedStage3(WindowedStage3):
    """A window whose step reads the gradients once for their norm, and updates in one launch.

    Args:
        state_format: The format of optimizer state.
        seed: Seed of stochastic rounding.
        *args: As for :class:`WindowedStage3`.
        **kwargs: Likewise.
    """

    _global_grad_norm: Any

    def __init__(self, *args: Any, state_format: StateFormat, seed: int, **kwargs: Any) -> None:
        self.state_format = state_format
        self._seed = seed
        self._table: tuple[Any, SegmentTable] | None = None
        super().__init__(*args, state_format=state_format, **kwargs)

    # ---- state ----------------------------------------------------------------------------------------------------

    def _setup_for_real_optimizer(self) -> None:
        if self.torch_autocast_gradscaler is not None:
            raise EngineError(
                "torch_autocast with float16 steps through a GradScaler of its own; use bf16 or DeepSpeed's fp16, or set "
                "lisa.optimizer to 'adamw'"
            )
        if self.state_format.precision == "stochastic_rounding":
            if self.dtype != torch.bfloat16:
                raise EngineError(
                    f"lisa.optimizer.precision: 'stochastic_rounding' rounds bfloat16 weights, but this model's are {self.dtype}; "
                    "train in bf16, or use 'mixed'"
                )
            if self.offload_optimizer or self.offload_param:
                key = "offload_optimizer" if self.offload_optimizer else "offload_param"
                raise EngineError(
                    "lisa.optimizer.precision: 'stochastic_rounding' updates the weights on the device that has the gradients; "
                    f"use 'mixed', or remove zero_optimization.{key}"
                )
        if self.master_weights_and_grads_dtype != torch.float32:
            raise EngineError(
                f"DeepSpeed's config asks for master weights in {self.master_weights_and_grads_dtype}, but lisa.optimizer "
                "'masked_adamw' keeps them in fp32, or has none under 'stochastic_rounding'; remove that option, or set "
                "lisa.optimizer to 'adamw'"
            )
        default_backend(
            "cpu" if self.offload_optimizer else torch.device(self.device).type
        )  # compiled now, if it must be
        super()._setup_for_real_optimizer()
        # Each parameter's place in the whole layout: the same in a resumed run, as ds_id need not be.
        everything = self.layout.parameters()
        self._number_of = {parameter.ds_id: number for number, (_, parameter) in enumerate(everything)}

    def _create_fp32_partitions(self) -> None:
        """See the base class. Without a master copy the 16-bit partition itself is updated."""
        if self.state_format.precision == "mixed":
            super()._create_fp32_partitions()
            return
        for flat, ids in zip(self.fp16_partitioned_groups_flat, self.fp16_partitioned_groups_flat_id, strict=True):
            itself = flat.detach()
            itself.requires_grad_(True)
            itself.ds_id = f"{ids[0]}_{ids[-1]}"
            self.fp32_partitioned_groups_flat.append(itself)
        for group in self.optimizer.param_groups:
            group["params"] = []

    def _moments_of(self, position: int) -> dict[str, Any]:
        """The moments of a sub-group of the window; zeros if it has none yet."""
        return self.unit_state.moments_of(self.layout.shown[position], self._sizes(position))

    def _sizes(self, position: int) -> list[int]:
        return [parameter.partition_numel() for parameter in self.fp16_groups[position]]

    def switch(self, sampled: Iterable[int], roles: Iterable[str] | None = None) -> None:
        """See the base class; also drops the cached launch, which refers to the state of units that stop training."""
        self._table = None
        super().switch(sampled, roles)

    @property
    def rounding_seed(self) -> int:
        """Seed of stochastic rounding, another one after each switch.

        Random numbers follow from seed, place and the unit's own step, which begins anew with every visit: by one seed alone an
        element would be rounded by the same numbers in each, so that some would never take a small update.
        """
        return self._seed + (self.num_switches << 32)

    # ---- step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """See the base class. The host waits once, at the end, to learn whether the step was taken."""
        self.settle_gradients()
        self._pre_step()
        self._partition_all_parameters()
        self.timers(OPTIMIZER_STEP_TIMER).start()
        scale = float(self.loss_scale)
        table = self._launch()
        norm = torch.zeros((), device=self.device) if table is None else self._scaled_norm(table)
        if not self.offload_optimizer:
            self.zero_grad(set_to_none=True)
        bad = (~norm.isfinite()).float()
        if table is not None:
            for part, factor in self._launches(table, self._factor(norm, scale), self.rounding_seed):
                masked_adamw_(part, factor=factor, found_inf=bad)
            self._count_steps()
        self._put_weights_in_place()
        self.overflow = bool(bad)
        self.timers(OPTIMIZER_STEP_TIMER).stop()
        self._update_scale(self.overflow)
        if self.overflow:
            self._global_grad_norm = float("inf")
            self._overflow_clean_up(scale)
            self.begin_gradients()
            return
        self._global_grad_norm = norm / scale
        for position in range(len(self.fp16_groups)):
            self.averaged_gradients[position] = None
        self._stepped()
        self.begin_gradients()
        self._post_step({OPTIMIZER_STEP_TIMER})

    def _launch(self) -> SegmentTable | None:
        """The table over all parameters with a gradient, reused if addresses are unchanged; None if there are none."""
        places, hypers = [], []
        for position, master in enumerate(self.fp32_partitioned_groups_flat):
            state = self._moments_of(position)
            present = [parameter.ds_id not in self.absent for parameter in self.fp16_groups[position]]
            if any(present) and not all(present) and STEPS not in state:
                state[STEPS] = state["step"].repeat(len(present))
            tensors = (self.fp16_partitioned_groups_flat[position], master, master.grad, *state.values())
            places.append([tensor.data_ptr() for tensor in tensors if isinstance(tensor, Tensor)])
            hyper = self._hyper(position)
            hypers += [hyper] * sum(present)
        places.append([self.grad_partitions_flat_buffer.data_ptr()])
        places.append(sorted(self.absent))
        if self._table is not None and self._table[0] == places:
            self._table[1].set_hypers(hypers)
            return self._table[1]
        segments = [s for position in range(len(self.fp16_groups)) for s in self._segments(position)]
        if not segments:
            return None
        table = SegmentTable(segments, hypers, seed=self.rounding_seed)
        self._table = (places, table)
        return table

    def _launches(self, table: SegmentTable, factor: Tensor, seed: int) -> list[tuple[SegmentTable, Tensor]]:
        """The launches of a fused step, each with its factor: one, or one for each unit under the norm-growth limiter.

        Args:
            table: The parameters of the window with a gradient.
            factor: The factor of every gradient.
            seed: Seed of stochastic rounding.
        """
        if self._growth_limit.factor is None:
            return [(table, factor)]
        parts: dict[Unit, tuple[list[Segment], list[Hyper]]] = {}
        units = [
            unit
            for unit, group in zip(self._shown_units, self.fp16_groups, strict=True)
            for parameter in group
            if parameter.ds_id not in self.absent
        ]
        for unit, segment, hyper in zip(units, table.segments, table.hypers, strict=True):
            segments, hypers = parts.setdefault(unit, ([], []))
            segments.append(segment)
            hypers.append(hyper)
        found = []
        for unit, (segments, hypers) in parts.items():
            own = self._growth_limit.of(unit)
            assert own is not None
            found.append((SegmentTable(segments, hypers, seed=seed), factor * own.to(table.device, torch.float32)))
        return found

    def _segments(self, position: int) -> list[Segment]:
        """One segment for each partition with a gradient: each has its own 8-bit scales, anywhere in the sub-group."""
        master, flat = self.fp32_partitioned_groups_flat[position].detach(), self.fp16_partitioned_groups_flat[position]
        state = self._moments_of(position)
        gradients: Mapping[int, Tensor] = getattr(self, supported.GRAD_PARTITIONS)
        steps = state[STEPS].unbind() if STEPS in state else itertools.repeat(state["step"])
        segments, scales = [], 0
        for (parameter, part), step in zip(self.slices(position), steps, strict=False):
            scaled = slice(scales, scales - -(part.stop - part.start) // QUANT_BLOCK)
            scales = scaled.stop
            if parameter.ds_id in self.absent:
                continue
            weight = flat[part] if flat.device == master.device else None
            gradient = gradients[parameter.ds_id]
            if self.offload_optimizer:
                host = self.fp32_partitioned_groups_flat[position].grad
                assert host is not None
                gradient = host[part]
            segments.append(
                Segment(
                    weight=weight,
                    grad=gradient,
                    master=None if self._is_alias(position) else master[part],
                    exp_avg=state["exp_avg"][part] if "exp_avg" in state else None,
                    exp_avg_sq=state["exp_avg_sq"][part] if "exp_avg_sq" in state else None,
                    exp_avg_scale=state["exp_avg_scale"][scaled] if "exp_avg_scale" in state else None,
                    exp_avg_sq_scale=state["exp_avg_sq_scale"][scaled] if "exp_avg_sq_scale" in state else None,
                    step=step,
                    stream=(parallel.stream_rank(parameter) << 32) + self._number_of[parameter.ds_id],
                )
            )
        return segments

    def _count_steps(self) -> None:
        """Where parameters count their own steps, set the sub-group's step count to the largest of them."""
        for position in range(len(self.fp16_groups)):
            state = self._moments_of(position)
            if STEPS in state:
                state["step"].copy_(state[STEPS].amax())

    def _is_alias(self, position: int) -> bool:
        master, flat = self.fp32_partitioned_groups_flat[position], self.fp16_partitioned_groups_flat[position]
        return master.data_ptr() == flat.data_ptr()

    def _hyper(self, position: int) -> Hyper:
        group = self.optimizer.param_groups[self.sub_group_to_group_id[position]]
        return Hyper(
            lr=group["lr"],
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            lr_scale=self._lr_scale(position) * group.get("lr_scale", 1.0),
        )

    def _scaled_norm(self, table: SegmentTable) -> Tensor:
        """Global norm of the gradients with the loss scale: ``()``; not finite if one of them is not."""
        if self._growth_limit.factor is None and not self.offload_optimizer and holds_own_parts(self):
            squares = sum_of_squares(table)
            dist.all_reduce(squares, group=self.sub_group_process_groups[0])
            return squares.sqrt().float()
        norms = torch.stack([torch.as_tensor(norm).to(table.device, torch.float64) for norm in self._get_norm_groups()])
        # Stage 3 says -1 for a norm that is not finite.
        norms = torch.where(norms < 0, float("inf"), norms)
        return norms.square().sum().sqrt().float()

    def _factor(self, norm: Tensor, scale: float) -> Tensor:
        """The factor of all gradients: clip coefficient over loss scale."""
        clip = torch.ones_like(norm)
        if self.clip_grad > 0.0:
            clip = (self.clip_grad / (norm / scale + 1e-6)).clamp(max=1.0)
        return clip / scale

    def _put_weights_in_place(self) -> None:
        for position, flat in enumerate(self.fp16_partitioned_groups_flat):
            master = self.fp32_partitioned_groups_flat[position]
            if flat.device != master.device:  # offloaded: the host has updated the master copy alone
                flat.copy_(master.detach())
            self._unflatten_partitioned_parameters(position)

    # ---- checkpoint and accessors ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        state = super().state_dict()
        if self.state_format.precision != "mixed":
            # Views of the whole 16-bit buffer, which would be saved with them.
            groups = state["fp32_flat_groups"]
            state["fp32_flat_groups"] = [group.detach().clone() for group in groups]
        return state

    def _rigid_load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        saved = state_dict["optimizer_state_dict"]
        # The groups by torch's way, the state by ours.
        without_state = {**state_dict, "optimizer_state_dict": {**saved, "state": {}}}
        super()._rigid_load_state_dict(without_state, load_optimizer_states)
        if load_optimizer_states:
            self._set_fp32_optimizer_param_groups()
            masters = [master for group in self.optimizer.param_groups for master in group["params"]]
            self._clear_fp32_optimizer_param_groups()
            self.unit_state.restore(saved, masters)
        self._table = None

    def _get_fp32_opt_state_partition(
        self, param: Any, release_swap_buffers: bool, optim_state_key: str | None = None
    ) -> tuple[Tensor, int]:
        """See the base class; 8-bit moments are returned decoded."""
        if self.state_format.moments == "none" and optim_state_key in ("exp_avg", "exp_avg_sq"):
            raise EngineError(f"{optim_state_key}: is not kept with lisa.optimizer.moments 'none'")
        position, offset, size = self.grad_position[self.get_param_id(param)]
        if self.state_format.moments != "int8" or optim_state_key not in ("exp_avg", "exp_avg_sq"):
            result: tuple[Tensor, int] = super()._get_fp32_opt_state_partition(
                param, release_swap_buffers, optim_state_key
            )
            return result
        state = self._moments_of(position)
        before = sum(-(-size // QUANT_BLOCK) for size in self._sizes(position)[: self._place_in_group(param, position)])
        scales = state[f"{optim_state_key}_scale"][before : before - -size // QUANT_BLOCK]
        decode = dequantise_signed if optim_state_key == "exp_avg" else dequantise_unsigned
        return decode(state[optim_state_key][offset : offset + size], scales), position

    def _place_in_group(self, param: Any, position: int) -> int:
        return next(i for i, other in enumerate(self.fp16_groups[position]) if other is param)

    def set_full_hp_param(self, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """See the base class."""
        self._refuse_to_set(optim_state_key)
        super().set_full_hp_param(value, param, optim_state_key)

    def set_local_hp_param(self, value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """See the base class."""
        self._refuse_to_set(optim_state_key)
        super().set_local_hp_param(value, param, optim_state_key)

    def _refuse_to_set(self, key: str | None) -> None:
        if key is not None and self.state_format.moments in ("int8", "none"):
            how = "in 8 bits" if self.state_format.moments == "int8" else "not at all"
            raise EngineError(f"{key} is kept {how} and cannot be set from outside; use moments 'fp32' for that")
