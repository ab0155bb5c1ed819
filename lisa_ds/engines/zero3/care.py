"""Care for what has come in at a switch: a learning rate that rises, and gradients that may not jump.

Note on re-warm-up.
    A unit that comes in has no moments, and Adam's first steps from none are as large as the rate allows, whatever the
    gradient. Its k-th step (from 0) is therefore taken at (k+1)/n of the rate, until k+1 = n.

Note on the limiter.
    Fira's norm-growth limiter (arXiv:2410.01623), with the unit in place of the matrix: where a unit's gradient norm exceeds f times
    that of its step before, as limited then, the gradient is scaled down to that. The norms are of what a step would use: reduced
    over all ranks, accumulated, without the loss scale. They stay on the device, and the host never waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lisa_ds.engines.zero3 import compat
from lisa_ds.engines.zero3.presence import PresentStage3
from lisa_ds.errors import EngineError
from lisa_ds.layers import Unit
from lisa_ds.ops import Hyper, Segment, SegmentTable

_INF = float("inf")


class Care:
    """Knows how long each unit has been in, and how large its last gradient was.

    Args:
        rewarm_steps: Steps over which a rate rises; 0 for none.
        growth_limit: Factor by which a norm may grow in a step, above 1; None for no limit.
        always: Units that train in every interval, whose rates do not rise.
    """

    def __init__(self, rewarm_steps: int = 0, growth_limit: float | None = None, always: Collection[Unit] = ()) -> None:
        self.growth_limit = growth_limit
        """As given."""
        self._rewarm_steps = rewarm_steps
        self._always = frozenset(always)
        self._ages: dict[Unit, int] = {}  # of the units that train: steps since they came in
        self._last: dict[Unit, Tensor] = {}  # of those with one: the norm of the last step, as it was limited
        self._coming: tuple[Tensor, Tensor] | None = None  # of the step in progress: norms as limited, factors
        self._order: list[Unit] = []  # of what is in ``_coming``

    # ---- units come and go ----------------------------------------------------------------------------------------

    def keep(self, units: Iterable[Unit]) -> None:
        """Make ``units`` those that train: who was among them before grows older, who was not begins."""
        self._ages = {unit: self._ages.get(unit, 0) for unit in units}
        self._last = {unit: norm for unit, norm in self._last.items() if unit in self._ages}
        self._coming = None

    def begin_anew(self) -> None:
        """Let every unit that trains begin: its moments are gone."""
        self._ages, self._last, self._coming = dict.fromkeys(self._ages, 0), {}, None

    def stepped(self) -> None:
        """Note that a step was taken; one that was skipped for overflow is none."""
        self._ages = {unit: age + 1 for unit, age in self._ages.items()}
        if self._coming is not None:
            self._last = dict(zip(self._order, self._coming[0].unbind(), strict=True))
            self._coming = None

    # ---- what it does to a step -----------------------------------------------------------------------------------

    def ramp(self, unit: Unit) -> float:
        """Share of its learning rate that ``unit`` has in its next step."""
        step = self._ages.get(unit, 0) + 1
        if step >= self._rewarm_steps or unit in self._always:
            return 1.0
        return step / self._rewarm_steps

    def limit(self, order: Sequence[Unit], norms: Tensor) -> Tensor:
        """Hold the gradients of the step in progress to their bounds.

        Args:
            order: The units that train.
            norms: ``(units,)``, float64: the norm of each one's gradient, without the loss scale.

        Returns:
            ``(units,)``: what they are once each gradient is multiplied by its :meth:`factor`; not finite where they were not.
        """
        assert self.growth_limit is not None
        none = norms.new_full((), _INF)
        last = torch.stack([self._last.get(unit, none) for unit in order])
        # A gradient of nothing but zeros bounds nothing: a unit would never move again.
        bounds = torch.where(last > 0, last * self.growth_limit, none)
        factors = (bounds / norms).clamp(max=1.0)
        factors = torch.where(norms > 0, factors, 1.0)
        self._order, self._coming = list(order), (norms * factors, factors)
        return self._coming[0]

    def factor(self, unit: Unit) -> Tensor | None:
        """What ``unit``'s gradient of the step in progress is multiplied by: ``()``, on the device; None for 1."""
        return None if self._coming is None else self._coming[1][self._order.index(unit)]

    # ---- checkpoint -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values, exactly."""
        return {"ages": dict(self._ages), "norms": {unit: float(norm) for unit, norm in self._last.items()}}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Go on from a checkpoint, for the units that train now; of one without ages, everything in it was trained for long."""
        ages = state.get("ages")
        self._ages = {unit: self._rewarm_steps if ages is None else ages.get(unit, 0) for unit in self._ages}
        norms = state.get("norms", {}) if self.growth_limit is not None else {}
        self._last = {
            unit: torch.tensor(norm, dtype=torch.float64, device=device)
            for unit, norm in norms.items()
            if unit in self._ages
        }
        self._coming = None


class CarefulStage3(PresentStage3):
    """Stage 3 that holds gradients to their units' bounds, if there are bounds; the window is built on it."""

    # Of the window.
    _care: Care
    _shown_units: list[Unit]

    def check_care(self) -> None:
        """Refuse what the limiter cannot see.

        Raises:
            EngineError: The loss is scaled by something other than DeepSpeed.
        """
        if self._care.growth_limit is not None and self.torch_autocast_gradscaler is not None:
            raise EngineError(
                f"lisa.norm_growth_limit: got {self._care.growth_limit}, but torch_autocast with float16 scales the loss by a "
                "GradScaler of its own, so that norms of two steps cannot be compared; use bf16 or DeepSpeed's fp16, or remove the "
                "limit"
            )

    def _get_norm_groups(self) -> list[Any]:
        """Norms with the loss scale whose squares add up to the whole: of each unit, within its bound, if there are bounds."""
        stock = super()._get_norm_groups
        if self._care.growth_limit is None:
            return list(stock())
        order, norms = unit_norms(self, self._shown_units, stock)
        limited = self._care.limit(order, norms / self.loss_scale) * self.loss_scale
        return list(limited.to(self.device).unbind())

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """See the base class; also holds the gradient to its unit's bound."""
        super().unscale_and_clip_grads(sub_group_id, total_norm)
        factor = self._care.factor(self._shown_units[sub_group_id])
        gradient = self.fp32_partitioned_groups_flat[sub_group_id].grad
        if factor is not None and gradient is not None:
            gradient.mul_(factor.to(gradient.device))

    def launches(self, table: SegmentTable, factor: Tensor, seed: int) -> list[tuple[SegmentTable, Tensor]]:
        """The launches of a fused step, each with its factor: one, or one for each unit where each has a factor of its own.

        Args:
            table: Over what of the window has a gradient.
            factor: What every gradient is multiplied by.
            seed: Of stochastic rounding.
        """
        if self._care.growth_limit is None:
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
            own = self._care.factor(unit)
            assert own is not None
            found.append((SegmentTable(segments, hypers, seed=seed), factor * own.to(table.device, torch.float32)))
        return found


def holds_own_parts(optimizer: Any) -> bool:
    """Whether each rank holds its own part of every gradient, of one group of ranks, so that squares may simply be added up."""
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
def unit_norms(
    optimizer: Any, units: Sequence[Unit], norms_of_groups: Callable[[], Sequence[Any]]
) -> tuple[list[Unit], Tensor]:
    """Norm of each unit's gradient over all ranks, with the loss scale.

    Args:
        optimizer: The window.
        units: The unit of each of its sub-groups.
        norms_of_groups: Stage 3's own norms of them, for ranks that share layers; -1 for one that is not finite. It talks once
            for each sub-group, where otherwise once is enough.

    Returns:
        The units in their order, and ``(units,)``, float64, on the device that computes.
    """
    order = list(dict.fromkeys(units))
    device = get_accelerator().current_device_name()
    if holds_own_parts(optimizer):
        squares = [_own_squares(optimizer, group, device) for group in optimizer.fp16_groups]
    else:
        norms = [torch.as_tensor(norm).to(device, torch.float64) for norm in norms_of_groups()]
        squares = [torch.where(norm < 0, _INF, norm).square() for norm in norms]
    of_units = torch.stack(
        [torch.stack([s for s, unit in zip(squares, units, strict=True) if unit == wanted]).sum() for wanted in order]
    )
    if holds_own_parts(optimizer):
        dist.all_reduce(of_units, group=optimizer.sub_group_process_groups[0])
    return order, of_units.sqrt()


def _own_squares(optimizer: Any, group: Sequence[Any], device: str) -> Tensor:
    if optimizer.offload_optimizer:  # taken when the gradients went to the host, of those that this rank has a part of
        known = optimizer.norm_for_param_grads
        norms = [known[key] for key in map(optimizer.get_param_id, group) if key in known]
        norms = [torch.as_tensor(norm).to(device, torch.float64) for norm in norms]
    else:
        partitions: Mapping[int, Tensor] = getattr(optimizer, compat.GRAD_PARTITIONS)
        norms = list(torch._foreach_norm([partitions[p.ds_id] for p in group], 2, torch.float32))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).double().square().sum()
