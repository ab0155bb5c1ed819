"""The life cycle of a unit's optimizer state: built when the unit begins to train, released when it stops, restored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lisa_ds.engines.common.growth_limit import NormGrowthLimit
from lisa_ds.engines.common.rewarm import Rewarm
from lisa_ds.engines.zero3.state.count import own_masters, state_bytes
from lisa_ds.engines.zero3.state.release import Release
from lisa_ds.layers import Unit
from lisa_ds.optim import StateFormat


class UnitState:
    """The optimizer state on this rank of the units that train.

    Note on where it is kept.
        State is kept by sub-group, the part of a unit in one parameter group. The live fp32 partitions (*masters*) are
        kept here, and shown to Stage 3 by the window. Moments are in the optimizer's own ``state``, by master, where
        learning-rate schedules, checkpoints and DeepSpeed's accessors look for them.

    Args:
        optimizer: The optimizer that the engine was given; it holds the moments.
        units: The unit of each sub-group of the whole layout.
        weights: The 16-bit partition of each. Where there is no master copy it is the master itself, and no state.
        create: Makes the masters of sub-groups from their 16-bit weights, ``(numel,)`` each, in order. When it is
            called only Stage 3's lists still refer to released state, and it re-points those before it allocates.
        host_gradient: Allocates the gradient that an offloaded master has from the start, of its shape; None without
            offload.
        state_format: The format of moments; None where the optimizer makes its own in its first step.
        rewarm: The learning-rate warm-up; told which units train, as their step counts are part of their state.
        growth_limit: Likewise, for the norms of their last gradients.
        release: Policy for the state of units that stop training.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: Sequence[Unit],
        weights: Sequence[Tensor],
        *,
        create: Callable[[Sequence[int]], Sequence[Tensor]],
        host_gradient: Callable[[Tensor], Tensor] | None = None,
        state_format: StateFormat | None = None,
        rewarm: Rewarm,
        growth_limit: NormGrowthLimit,
        release: Release,
    ) -> None:
        self._optimizer, self._units, self._weights = optimizer, tuple(units), tuple(weights)
        self._create, self._host_gradient, self._state_format = create, host_gradient, state_format
        self._rewarm, self._growth_limit = rewarm, growth_limit
        self._release = release
        self._masters: dict[int, Tensor] = {}  # of the sub-groups that are live

    # ---- who has state --------------------------------------------------------------------------------------------

    def sub_groups(self, units: Iterable[Unit]) -> list[int]:
        """The sub-groups of ``units``, ascending."""
        wanted = set(units)
        return [i for i, unit in enumerate(self._units) if unit in wanted]

    def adopt(self, units: Collection[Unit], masters: Sequence[Tensor]) -> None:
        """Take over ``masters`` of ``units``, which Stage 3 has built itself together with everything else."""
        self._masters = dict(zip(self.sub_groups(units), masters, strict=True))
        self._care_for(units)

    def train(self, units: Collection[Unit]) -> None:
        """Set the units that have state: release those that stop, then build those that begin. Others keep theirs."""
        wanted = self.sub_groups(units)
        self._let_go(sorted(self._masters.keys() - set(wanted)))
        self._build([i for i in wanted if i not in self._masters])
        self._care_for(units)

    def _let_go(self, sub_groups: Sequence[int]) -> None:
        for i in sub_groups:
            master = self._masters.pop(i)
            self._release.leaves(i, master, self._optimizer.state.pop(master, {}))
            master.grad = None

    def _build(self, sub_groups: Sequence[int]) -> None:
        if not sub_groups:
            return
        for i, master in zip(sub_groups, self._create(sub_groups), strict=True):
            if self._host_gradient is not None:
                master.grad = self._host_gradient(master)
            if moments := self._release.returns(i, master):
                self._optimizer.state[master] = moments
            self._masters[i] = master

    def _care_for(self, units: Collection[Unit]) -> None:
        self._rewarm.keep(units)
        self._growth_limit.keep(units)

    # ---- what it is -----------------------------------------------------------------------------------------------

    def masters(self, sub_groups: Iterable[int]) -> list[Tensor]:
        """The masters of those of ``sub_groups`` that are live, in order: ``(numel,)``, fp32 if there is a copy."""
        return [self._masters[i] for i in sub_groups if i in self._masters]

    def moments_of(self, sub_group: int, sizes: Sequence[int]) -> dict[str, Any]:
        """The moments and step count of a live sub-group, to be updated in place; zeros if it has none yet.

        Args:
            sub_group: Which one.
            sizes: Elements of each parameter's part of it: each has 8-bit scales of its own.
        """
        assert self._state_format is not None
        master = self._masters[sub_group]
        state: dict[str, Any] = self._optimizer.state[master]
        if not state:
            state.update(self._state_format.new_moments(master.detach(), sizes))
        return state

    def of(self, unit: Unit) -> list[dict[str, Any]]:
        """The live state of ``unit`` on this rank, not a copy.

        Returns:
            For each of its sub-groups, the ``master`` if there is a copy, and once it has taken a step what the optimizer keeps: of
            AdamW ``exp_avg``, ``exp_avg_sq`` and ``step``. Nothing for a unit that does not train.
        """
        found = []
        for i in self.sub_groups([unit]):
            if i in self._masters:
                master = self._masters[i]
                table = dict(self._optimizer.state.get(master, {}))
                found.append({"master": master, **table} if self._copies([i]) else table)
        return found

    def _copies(self, sub_groups: Iterable[int]) -> list[Tensor]:
        """The masters of these live sub-groups that are real copies, not the 16-bit weights."""
        live = list(sub_groups)
        return own_masters(self.masters(live), [self._weights[i] for i in live])

    @property
    def has_moments(self) -> bool:
        """Whether everything that trains has taken a step: moments come with the first."""
        return all(self._optimizer.state.get(master) for master in self._masters.values())

    def bytes(self) -> dict[str, int]:
        """Bytes of state on this rank: ``master``, ``exp_avg``, ``exp_avg_sq``, ``parked_host`` and ``parked_nvme``."""
        live = state_bytes(self._copies(self._masters), self._optimizer.state.values())
        return {**live, **self._release.parked_bytes()}

    # ---- forgotten and restored -----------------------------------------------------------------------------------

    def forget_moments(self) -> None:
        """Drop the moments of everything that trains, and all kept state; moments start at zero in the next step."""
        self._optimizer.state.clear()
        self._release.forget()
        self._rewarm.begin_anew()
        self._growth_limit.begin_anew()

    def restore(self, saved: Mapping[str, Any], masters: Sequence[Tensor]) -> None:
        """Load saved moments without conversion.

        torch casts loaded state to the parameter's type, which 8-bit codes and fp32 moments beside bf16 would not survive.

        Args:
            saved: An optimizer's ``state_dict()``.
            masters: The live masters in the order of its parameters.
        """
        identifiers = [i for group in saved["param_groups"] for i in group["params"]]
        for identifier, master in zip(identifiers, masters, strict=True):
            if identifier in saved["state"]:
                state = {
                    k: torch.as_tensor(v).to(master.device, copy=True) for k, v in saved["state"][identifier].items()
                }
                self._optimizer.state[master] = state | {"step": state["step"].float().reshape(())}

    def care_state_dict(self) -> dict[str, Any]:
        """The warm-up's counts and the limiter's norms for the units that train: plain values."""
        return {"ages": self._rewarm.state_dict(), "norms": self._growth_limit.state_dict()}

    def load_care_state_dict(
        self, saved: Mapping[str, Any], units: Collection[Unit], device: torch.device | str
    ) -> None:
        """Restore from :meth:`care_state_dict`, for ``units``, which train now; norms are kept on ``device``."""
        self._rewarm.load_state_dict(saved.get("ages"))
        self._growth_limit.load_state_dict(saved.get("norms", {}), units, device)
