"""The ZeRO-3 optimizer as a window over the sampled units.

Note on the window.
    A *unit* is what is sampled or frozen as a whole: a block (its index) or one of the roles ``embeddings``, ``lm_head``,
    ``rest``. Stage 3 keeps its work in lists with one entry for each *sub-group* of parameters, and its loops (norm, clip,
    overflow, step, state_dict) run over those lists. Here a sub-group is the part of one unit that lies in one parameter
    group. All sub-groups are laid out once in the 16-bit flat buffer; the lists then show only those of the sampled
    units, so that fp32 partitions, moments and gradients exist for these alone, and Stage 3's own code sees nothing else.
    A switch retires the sub-groups that leave, materialises those that come, and re-points the lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lisa_ds.engines.zero3 import supported
from lisa_ds.engines.zero3.optimizer.gradient_norms import unit_norms
from lisa_ds.engines.zero3.optimizer.missing_gradients import MissingGradientsStage3
from lisa_ds.engines.zero3.optimizer.plan import WindowPlan
from lisa_ds.errors import CheckpointError, EngineError
from lisa_ds.layers import ROLES, Unit

_STATE_KEY = "lisa"


class WindowedStage3(MissingGradientsStage3):
    """ZeRO-3 whose optimizer state, gradients and fp32 partitions exist for the sampled units only.

    Args:
        plan: The units, and those that train first.
        *args: As for ``DeepSpeedZeroOptimizer_Stage3``.
        **kwargs: Likewise.
    """

    # The base class is untyped; these are the attributes of it that are set here.
    grad_partitions_flat_buffer: Any
    grad_position: dict[int, list[int]]
    sub_group_to_group_id: dict[int, int]

    def __init__(self, *args: Any, plan: WindowPlan, **kwargs: Any) -> None:
        self._plan = plan
        self._sampled: tuple[int, ...] = plan.sampled
        self._roles: tuple[str, ...] = plan.roles
        self._rewarm, self._growth_limit = plan.rewarm, plan.growth_limit
        self.block_lr_scales: Mapping[int, float] = {}
        """Learning-rate factor of blocks in this interval; those not named train at the optimizer's own rate."""
        self._lr_scales_of_step: list[float] = []
        self._absent_of_step: frozenset[int] = frozenset()
        super().__init__(*args, **kwargs)

    # ---- layout: what the base class asks while it is built ------------------------------------------------------

    def _create_fp16_sub_groups(self, params_group: Sequence[Any]) -> list[list[Any]]:
        """One sub-group for each unit of ``params_group``, in place of sub-groups of a given size."""
        by_unit: dict[Unit, list[Any]] = {}
        for parameter in params_group:
            unit = self._plan.unit_of.get(id(parameter))
            if unit is None:
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                raise EngineError(
                    f"the optimizer holds a parameter of shape {shape} that is not the model's; build it from the parameters "
                    "of the model given to initialize"
                )
            by_unit.setdefault(unit, []).append(parameter)
        return list(by_unit.values())

    def _setup_for_real_optimizer(self) -> None:
        """Remember the whole layout, then let the base class allocate state for the first window only."""
        supported.check_attributes(self)
        self._check_growth_limit()
        self._all = {name: list(getattr(self, name)) for name in supported.SUB_GROUP_LISTS}
        self._param_group_of = dict(self.sub_group_to_group_id)
        self._unit_of_sub_group = [self._plan.unit_of[id(group[0])] for group in self._all["fp16_groups"]]
        self._master: dict[int, Tensor] = {}  # sub-group -> its live fp32 partition
        self.watch_gradients()
        self._roles = self.present(self._roles)
        window = self._sub_groups((*self._sampled, *self._roles))
        if not window:
            raise EngineError("nothing to train: no block is sampled and every other parameter is frozen")
        self._keep((*self._sampled, *self._roles))
        self._show(window)
        super()._setup_for_real_optimizer()
        self._master = dict(zip(window, self.fp32_partitioned_groups_flat, strict=True))

    def create_reduce_and_remove_grad_hooks(self) -> None:
        """Register the gradient hooks of every unit, once: a frozen leaf gets no gradient, so its hook never fires."""
        self._show(range(len(self._unit_of_sub_group)))
        super().create_reduce_and_remove_grad_hooks()
        self._show(self._sub_groups((*self._sampled, *self._roles)))
        self._mark_window()
        self.require_grad_of_window()

    def _sub_groups(self, units: Iterable[Unit]) -> list[int]:
        wanted = set(units)
        return [i for i, unit in enumerate(self._unit_of_sub_group) if unit in wanted]

    def _show(self, sub_groups: Iterable[int]) -> None:
        """Point every list of the base class at ``sub_groups`` alone."""
        sub_groups = list(sub_groups)
        for name, entries in self._all.items():
            setattr(self, name, [entries[i] for i in sub_groups])
        self.sub_group_to_group_id = {position: self._param_group_of[i] for position, i in enumerate(sub_groups)}
        self.fp32_partitioned_groups_flat = [self._master[i] for i in sub_groups if i in self._master]
        self._shown_units = [self._unit_of_sub_group[i] for i in sub_groups]

    def require_grad_of_window(self) -> None:
        """Let exactly the window's parameters require grad, whatever others (an adapter's on and off) made of it."""
        window = set(self._sub_groups((*self._sampled, *self._roles)))
        for i, group in enumerate(self._all["fp16_groups"]):
            for parameter in group:
                parameter.requires_grad_(i in window)
                if i not in window:
                    parameter.grad = None

    def _mark_window(self) -> None:
        """Tell the next engine of this model who is frozen by this one alone; see :func:`policies.apply`."""
        window = set(self._sub_groups((*self._sampled, *self._roles)))
        for i, group in enumerate(self._all["fp16_groups"]):
            for parameter in group:
                parameter.lisa_waits = i not in window

    # ---- switch ---------------------------------------------------------------------------------------------------

    @property
    def sampled(self) -> tuple[int, ...]:
        """Blocks that train now, ascending."""
        return self._sampled

    @property
    def lr_scales(self) -> list[float]:
        """Learning-rate factor that each sub-group of the window had in the last step."""
        return list(self._lr_scales_of_step)

    @property
    def absent_of_step(self) -> frozenset[int]:
        """``ds_id`` of each parameter of the window that took no part in the last step."""
        return self._absent_of_step

    @property
    def roles(self) -> tuple[str, ...]:
        """Of embeddings, head and rest, those of which something trains now."""
        return self._roles

    def present(self, roles: Iterable[str]) -> tuple[str, ...]:
        """Those of ``roles`` of which something can train."""
        wanted = set(self._unit_of_sub_group).intersection(roles)
        return tuple(role for role in ROLES if role in wanted)

    @torch.no_grad()
    def switch(self, sampled: Iterable[int], roles: Iterable[str] | None = None) -> None:
        """Make ``sampled`` the blocks that train, and ``roles`` the roles; release the state of what leaves.

        A unit in both the old and the new set keeps its state. Call it between optimizer steps only, on every rank alike.

        Args:
            sampled: Indices of blocks.
            roles: Roles, of which those with nothing to train are passed over; None for those that train now.
        """
        sampled = tuple(sorted(sampled))
        wanted = self._roles if roles is None else self.present(roles)
        old, new = self._sub_groups((*self._sampled, *self._roles)), self._sub_groups((*sampled, *wanted))
        if not new:
            raise EngineError(
                f"nothing to train: layers {list(sampled)} are sampled and every other parameter is frozen"
            )
        self._finish_reductions()
        self._release_gradients()
        self._retire(sorted(set(old) - set(new)))
        self._materialise(sorted(set(new) - set(old)))
        self._sampled, self._roles = sampled, wanted
        self._keep((*sampled, *wanted))
        self._show(new)
        self._rebuild_gradient_partitions()
        self._mark_window()
        self.require_grad_of_window()

    def _finish_reductions(self) -> None:
        if self.micro_step_id or self._epilogue_ran_this_backward:
            raise EngineError(
                "there are gradients that no step has used yet; a switch would lose them: switch after step()"
            )
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()  # it may still write into the gradient buffer

    def _retire(self, sub_groups: Iterable[int]) -> None:
        for i in sub_groups:
            master = self._master.pop(i)
            self.optimizer.state.pop(master, None)
            master.grad = None

    def _materialise(self, sub_groups: Sequence[int]) -> None:
        """Build the fp32 partitions of ``sub_groups`` from their 16-bit weights; moments start at zero at the next step."""
        if not sub_groups:
            return
        self._show(sub_groups)
        self.fp32_partitioned_groups_flat = []
        self._create_fp32_partitions()
        for master in self.fp32_partitioned_groups_flat if self.offload_optimizer else ():
            master.grad = self._pinned(torch.zeros_like(master, requires_grad=False))
        self._master.update(zip(sub_groups, self.fp32_partitioned_groups_flat, strict=True))

    def _release_gradients(self) -> None:
        """Free the gradient buffer, and with it what lies in it, before anything that comes in is allocated."""
        getattr(self, supported.GRAD_PARTITIONS).clear()
        self.averaged_gradients = {}
        self._written.clear()
        self.grad_partitions_flat_buffer = None

    def _rebuild_gradient_partitions(self) -> None:
        """Give each sampled parameter its slice of a new gradient buffer."""
        parameters = list(itertools.chain.from_iterable(self.fp16_groups))
        sizes = [parameter.partition_numel() for parameter in parameters]
        # Zeros: padding after the last element of an odd-sized parameter is never written, but enters the norm.
        buffer = self._pinned(torch.zeros(sum(sizes), dtype=self.gradient_accumulation_dtype, device=self.device))
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

    def _pinned(self, tensor: Tensor) -> Tensor:
        """``tensor``, of an offloaded optimizer, in pinned memory if the config asks for it."""
        pinned: Tensor = get_accelerator().pin_memory(tensor) if self.offload_optimizer_pin_memory else tensor
        return pinned

    def sampled_without_gradient(self) -> tuple[int, ...]:
        """Sampled blocks of which no parameter has a gradient for the step to come."""
        self.settle_gradients()
        with_gradient = {
            self._plan.unit_of[id(parameter)]
            for parameter in itertools.chain.from_iterable(self.fp16_groups)
            if parameter.ds_id not in self.absent
        }
        return tuple(layer for layer in self._sampled if layer not in with_gradient)

    def _keep(self, units: Collection[Unit]) -> None:
        self._rewarm.keep(units)
        self._growth_limit.keep(units)

    # ---- step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Any = None) -> None:
        """See the base class."""
        self.settle_gradients()
        super().step(closure)
        if not self.overflow:
            self._stepped()
        self.begin_gradients()

    def _stepped(self) -> None:
        """Note that a step was taken, not skipped."""
        self._absent_of_step = self.absent
        self._lr_scales_of_step = [self._lr_scale(position) for position in range(len(self.fp16_groups))]
        self._rewarm.stepped()
        self._growth_limit.stepped()

    def _lr_scale(self, sub_group_id: int) -> float:
        unit = self._shown_units[sub_group_id]
        own = self.block_lr_scales.get(unit, 1.0) if isinstance(unit, int) else self._plan.lr_scales.get(unit, 1.0)
        return own * self._rewarm.share(unit)

    def _optimizer_step(self, sub_group_id: int) -> None:
        """One sub-group's update, at its unit's share of the learning rate."""
        scale = self._lr_scale(sub_group_id)
        if scale == 1.0:
            super()._optimizer_step(sub_group_id)
            return
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        lr = group["lr"]
        group["lr"] = lr * scale
        try:
            super()._optimizer_step(sub_group_id)
        finally:
            group["lr"] = lr

    # ---- norm-growth limit ----------------------------------------------------------------------------------------

    def _check_growth_limit(self) -> None:
        if self._growth_limit.factor is not None and self.torch_autocast_gradscaler is not None:
            raise EngineError(
                f"lisa.norm_growth_limit: got {self._growth_limit.factor}, but torch_autocast with float16 scales the loss by a "
                "GradScaler of its own, so that norms of two steps cannot be compared; use bf16 or DeepSpeed's fp16, or remove the "
                "limit"
            )

    def _get_norm_groups(self) -> list[Any]:
        """Norms with the loss scale whose squares add up to the whole: of each unit, within its bound, if there are bounds."""
        stock = super()._get_norm_groups
        if self._growth_limit.factor is None:
            return list(stock())
        order, norms = unit_norms(self, self._shown_units, stock)
        limited = self._growth_limit.limit(order, norms / self.loss_scale) * self.loss_scale
        return list(limited.to(self.device).unbind())

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """See the base class; also holds the gradient to its unit's bound."""
        super().unscale_and_clip_grads(sub_group_id, total_norm)
        factor = self._growth_limit.of(self._shown_units[sub_group_id])
        gradient = self.fp32_partitioned_groups_flat[sub_group_id].grad
        if factor is not None and gradient is not None:
            gradient.mul_(factor.to(gradient.device))

    # ---- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Stage 3's state of the sampled sub-groups, and which units they belong to."""
        state: dict[str, Any] = super().state_dict()
        state[_STATE_KEY] = {
            "sampled": self._sampled,
            "roles": self._roles,
            "care": {"ages": self._rewarm.state_dict(), "norms": self._growth_limit.state_dict()},
        }
        return state

    def _rigid_load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        if _STATE_KEY not in state_dict:
            raise CheckpointError("the checkpoint's optimizer state was not written by lisa_ds; it cannot be resumed")
        saved = state_dict[_STATE_KEY]
        # A checkpoint that does not tell its roles is of a run in which they were the same in all intervals, as here.
        sampled, roles = tuple(saved["sampled"]), tuple(saved.get("roles", self._roles))
        if (sampled, roles) != (self._sampled, self._roles):
            self.switch(sampled, roles)
        if len(state_dict["fp32_flat_groups"]) != len(self.fp32_partitioned_groups_flat):
            raise CheckpointError(
                f"the checkpoint's optimizer state has {len(state_dict['fp32_flat_groups'])} groups of parameters that train, this "
                f"run's has {len(self.fp32_partitioned_groups_flat)}; build the optimizer with the parameter groups of the saved run"
            )
        # torch's load_state_dict keeps what the file does not have: moments of before the load must not survive it.
        self.forget_moments()
        super()._rigid_load_state_dict(state_dict, load_optimizer_states)
        care = saved.get("care", {})
        self._rewarm.load_state_dict(care.get("ages"))
        units: tuple[Unit, ...] = (*self._sampled, *self._roles)
        self._growth_limit.load_state_dict(care.get("norms", {}), units, get_accelerator().current_device_name())

    def forget_moments(self) -> None:
        """Drop the moments of every sampled sub-group; they start at zero at the next step."""
        self.optimizer.state.clear()
        self._rewarm.begin_anew()
        self._growth_limit.begin_anew()

    def forget_second_copies(self) -> None:
        """Drop what hpZ keeps of every weight, after weights have been read; a step drops that of the window alone."""
        for parameter in self.module.parameters():
            parameter.ds_secondary_tensor = None

    def owned(self) -> set[int]:
        """``id`` of every parameter that trains when its unit is sampled."""
        return {id(parameter) for group in self._all["fp16_groups"] for parameter in group}
