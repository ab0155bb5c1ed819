"""The ZeRO-3 optimizer as a window over the sampled units.

Note on the window.
    A *unit* is what is sampled or frozen as a whole: a block (its index) or one of the roles ``embeddings``, ``lm_head``,
    ``rest``. Stage 3 keeps its work in lists with one entry for each *sub-group* of parameters, and its loops (norm, clip,
    overflow, step, state_dict) run over those lists. Here a sub-group is the part of one unit that lies in one parameter
    group. All sub-groups are laid out once in the 16-bit flat buffer; the lists then show only those of the sampled
    units, so that fp32 partitions, moments and gradients exist for these alone, and Stage 3's own code sees nothing else.
    A switch re-points the lists, and :class:`lisa_ds.engines.zero3.state.unit_state.UnitState` releases the state of
    units that stop training and builds that of units that begin.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lisa_ds.engines.zero3 import supported
from lisa_ds.engines.zero3.optimizer.gradient_buffer import GradientBufferStage3
from lisa_ds.engines.zero3.optimizer.gradient_norms import unit_squares
from lisa_ds.engines.zero3.optimizer.plan import WindowPlan
from lisa_ds.engines.zero3.optimizer.sub_groups import SubGroups
from lisa_ds.engines.zero3.state.unit_state import UnitState
from lisa_ds.errors import CheckpointError, EngineError
from lisa_ds.layers import ROLES, Unit
from lisa_ds.optim import StateFormat

_STATE_KEY = "lisa"


class WindowedStage3(GradientBufferStage3):
    """ZeRO-3 whose optimizer state, gradients and fp32 partitions exist for the sampled units only.

    Args:
        plan: The units, and those that train first.
        state_format: The format of the state; None where the given optimizer makes its own.
        *args: As for ``DeepSpeedZeroOptimizer_Stage3``.
        **kwargs: Likewise.
    """

    sub_group_to_group_id: dict[int, int]  # of the base class, which is untyped

    unit_state: UnitState
    """The optimizer state of the units that train."""

    def __init__(self, *args: Any, plan: WindowPlan, state_format: StateFormat | None = None, **kwargs: Any) -> None:
        self._plan, self._format_of_moments = plan, state_format
        self._sampled: tuple[int, ...] = plan.sampled
        self._roles: tuple[str, ...] = plan.roles
        self._rewarm, self._growth_limit = plan.rewarm, plan.growth_limit
        self.block_lr_scales: Mapping[int, float] = {}
        """Learning-rate factor of blocks in this interval; those not named train at the optimizer's own rate."""
        self.num_switches = 0
        """Switches so far; resumed."""
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
        """Keep the whole layout, then let the base class allocate state for the first window only."""
        supported.check_attributes(self)
        self._check_growth_limit()
        self.layout = SubGroups(self, self._plan.unit_of)
        """The whole layout."""
        self.unit_state = UnitState(
            self.optimizer,
            self.layout.units,
            self.layout.weights,
            create=self._create_partitions_of,
            host_gradient=self._host_gradient if self.offload_optimizer else None,
            state_format=self._format_of_moments,
            rewarm=self._rewarm,
            growth_limit=self._growth_limit,
            release=self._plan.release,
        )
        self.watch_gradients()
        self._roles = self.present(self._roles)
        window = self._window
        if not window:
            raise EngineError("nothing to train: no block is sampled and every other parameter is frozen")
        self._show(window)
        super()._setup_for_real_optimizer()
        self.unit_state.adopt(self._units, self.fp32_partitioned_groups_flat)

    def _create_partitions_of(self, sub_groups: Sequence[int]) -> list[Tensor]:
        """Have the base class build the fp32 partitions of ``sub_groups`` from their 16-bit weights."""
        self.layout.show(self, sub_groups, masters=[])
        self._create_fp32_partitions()
        return self.fp32_partitioned_groups_flat

    def _host_gradient(self, master: Tensor) -> Tensor:
        return self.pinned(torch.zeros_like(master, requires_grad=False))

    def create_reduce_and_remove_grad_hooks(self) -> None:
        """Register the gradient hooks of every unit, once: a frozen leaf gets no gradient, so its hook never fires."""
        self._show(range(len(self.layout.units)))
        super().create_reduce_and_remove_grad_hooks()
        self._show(self._window)
        self.layout.mark(self._window)
        self.require_grad_of_window()

    @property
    def _units(self) -> tuple[Unit, ...]:
        return (*self._sampled, *self._roles)

    @property
    def _window(self) -> list[int]:
        """The sub-groups that train."""
        return self.unit_state.sub_groups(self._units)

    @property
    def _shown_units(self) -> list[Unit]:
        """The unit of each sub-group that the lists show."""
        return self.layout.shown_units

    def _show(self, sub_groups: Sequence[int]) -> None:
        self.layout.show(self, sub_groups, self.unit_state.masters(sub_groups))

    def require_grad_of_window(self) -> None:
        """Let exactly the window's parameters require grad, whatever other code (switching adapters) has set."""
        self.layout.require_grad(self._window)

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
        """``ds_id`` of each parameter of the window that had no gradient in the last step."""
        return self._absent_of_step

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles (embeddings, head, rest) in which something trains now."""
        return self._roles

    def present(self, roles: Iterable[str]) -> tuple[str, ...]:
        """Those of ``roles`` in which something can train."""
        wanted = set(self.layout.units).intersection(roles)
        return tuple(role for role in ROLES if role in wanted)

    @torch.no_grad()
    def switch(self, sampled: Iterable[int], roles: Iterable[str] | None = None) -> None:
        """Train the blocks ``sampled`` and the roles ``roles``; release the state of units that stop training.

        A unit in both the old and the new set keeps its state. Call it between optimizer steps only, on every rank alike.

        Args:
            sampled: Indices of blocks.
            roles: Roles; those with nothing to train are skipped. None for those that train now.
        """
        sampled = tuple(sorted(sampled))
        wanted = self._roles if roles is None else self.present(roles)
        units: tuple[Unit, ...] = (*sampled, *wanted)
        new = self.unit_state.sub_groups(units)
        if not new:
            raise EngineError(
                f"nothing to train: layers {list(sampled)} are sampled and every other parameter is frozen"
            )
        self.finish_reductions()
        self.release_gradients()  # before anything that comes in is allocated
        self.unit_state.train(units)
        self._sampled, self._roles = sampled, wanted
        self.num_switches += 1
        self._show(new)
        self.rebuild_gradient_partitions()
        self.layout.mark(new)
        self.require_grad_of_window()

    def sampled_without_gradient(self) -> tuple[int, ...]:
        """Sampled blocks in which no parameter has a gradient for the next step."""
        self.settle_gradients()
        with_gradient = {
            self._plan.unit_of[id(parameter)]
            for parameter in itertools.chain.from_iterable(self.fp16_groups)
            if parameter.ds_id not in self.absent
        }
        return tuple(layer for layer in self._sampled if layer not in with_gradient)

    # ---- step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Any = None) -> None:
        """See the base class."""
        self.settle_gradients()
        super().step(closure)
        if not self.overflow:
            self._stepped()
        self.begin_gradients()

    def _stepped(self) -> None:
        """Record that a step was applied, not skipped."""
        self._absent_of_step = self.absent
        self._lr_scales_of_step = [self._lr_scale(position) for position in range(len(self.fp16_groups))]
        self._rewarm.stepped()
        self._growth_limit.stepped()

    def _lr_scale(self, sub_group_id: int) -> float:
        unit = self._shown_units[sub_group_id]
        own = self.block_lr_scales.get(unit, 1.0) if isinstance(unit, int) else self._plan.lr_scales.get(unit, 1.0)
        return own * self._rewarm.share(unit)

    def _optimizer_step(self, sub_group_id: int) -> None:
        """Update one sub-group, with its unit's learning-rate factor."""
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

    def unit_squares(self) -> dict[Unit, Tensor]:
        """Squared 2-norm of the gradient of each unit that trains, over all ranks, as :meth:`step` finds it.

        Every rank must call it, between the last backward of a step and the step.

        Returns:
            By unit ``()``, fp64, on the device that computes; without the loss scale.
        """
        self.settle_gradients()
        order, squares = unit_squares(self, self._shown_units, super()._get_norm_groups)
        return dict(zip(order, (squares / float(self.loss_scale) ** 2).unbind(), strict=True))

    # ---- norm-growth limit ----------------------------------------------------------------------------------------

    def _check_growth_limit(self) -> None:
        if self._growth_limit.factor is not None and self.torch_autocast_gradscaler is not None:
            raise EngineError(
                f"lisa.norm_growth_limit: got {self._growth_limit.factor}, but torch_autocast with float16 scales the loss by a "
                "GradScaler of its own, so that norms of two steps cannot be compared; use bf16 or DeepSpeed's fp16, or remove the "
                "limit"
            )

    def _get_norm_groups(self) -> list[Any]:
        """Norms with the loss scale whose squares sum to the global norm's: after the norm-growth limit, by unit."""
        stock = super()._get_norm_groups
        if self._growth_limit.factor is None:
            return list(stock())
        order, squares = unit_squares(self, self._shown_units, stock)
        limited = self._growth_limit.limit(order, squares.sqrt() / self.loss_scale) * self.loss_scale
        return list(limited.to(self.device).unbind())

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """See the base class; also applies the norm-growth limit of its unit."""
        super().unscale_and_clip_grads(sub_group_id, total_norm)
        factor = self._growth_limit.of(self._shown_units[sub_group_id])
        gradient = self.fp32_partitioned_groups_flat[sub_group_id].grad
        if factor is not None and gradient is not None:
            gradient.mul_(factor.to(gradient.device))

    # ---- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Stage 3's state of the sampled sub-groups, and the units they belong to."""
        state: dict[str, Any] = super().state_dict()
        state[_STATE_KEY] = {
            "sampled": self._sampled,
            "roles": self._roles,
            "care": self.unit_state.care_state_dict(),
            "num_switches": self.num_switches,
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
        self.num_switches = saved.get("num_switches", 0)
        if len(state_dict["fp32_flat_groups"]) != len(self.fp32_partitioned_groups_flat):
            raise CheckpointError(
                f"the checkpoint's optimizer state has {len(state_dict['fp32_flat_groups'])} groups of parameters that train, this "
                f"run's has {len(self.fp32_partitioned_groups_flat)}; build the optimizer with the parameter groups of the saved run"
            )
        # torch's load_state_dict keeps what the file does not have: moments of before the load must not survive it.
        self.unit_state.forget_moments()
        super()._rigid_load_state_dict(state_dict, load_optimizer_states)
        device = get_accelerator().current_device_name()
        self.unit_state.load_care_state_dict(saved.get("care", {}), self._units, device)

    def forget_second_copies(self) -> None:
        """Drop hpZ's second copy of every weight, after weights were loaded; a step drops only that of the window."""
        for parameter in self.module.parameters():
            parameter.ds_secondary_tensor = None

    def owned(self) -> set[int]:
        """``id`` of every parameter that trains when its unit is sampled."""
        return {id(parameter) for _, parameter in self.layout.parameters()}
