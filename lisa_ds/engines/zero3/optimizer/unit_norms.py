"""2-norms of many tensors by unit, and of an Adam update from its moments: plain torch, no host sync, little memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lisa_ds.config.formats import QUANT_BLOCK
from lisa_ds.engines.common.adam import decouples, is_adam
from lisa_ds.ops import cpu, unavailable
from lisa_ds.ops.segments import TYPE_CODES

# Elements that torch adds up in fp32; their sums are added up in fp64. On the CPU it adds in few lanes, and loses digits sooner.
_NORM_CHUNK = {"cpu": 2**14}
_NORM_CHUNK_ELSEWHERE = 2**20
_UPDATE_CHUNK = 1024 * QUANT_BLOCK  # elements of an update that exist at a time


@dataclass(frozen=True)
class Part:
    """Elements that belong to a unit: this rank's partition of a parameter, or of its gradient."""

    values: Tensor
    """Flat or not, contiguous, of any floating type and on any device."""

    unit: int
    """Position of the unit."""

    share: float = 1.0
    """Weight of its square in the sum: 1 / n where n ranks hold a copy of it."""


class UnitSquares:
    """Adds up the squares of parts by unit.

    Args:
        num_units: Number of units.
        device: Device of the sums.
    """

    def __init__(self, num_units: int, device: torch.device | str) -> None:
        self._num_units = num_units
        self.device = torch.device(device)
        self._places: tuple[tuple[tuple[int, float], ...], Tensor, Tensor] | None = None

    def zeros(self) -> Tensor:
        """Sums of nothing: ``(num_units,)``, fp64."""
        return torch.zeros(self._num_units, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def of(self, parts: Sequence[Part]) -> Tensor:
        """The sums over ``parts``: ``(num_units,)``, fp64. The host does not wait for the device."""
        on_host: list[Part] = []
        by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[tuple[int, float]]]] = {}
        for part in parts:
            if not part.values.numel():
                continue
            if _takes_kernel(part.values):
                on_host.append(part)
                continue
            tensors, places = by_kind.setdefault((part.values.device, part.values.dtype), ([], []))
            size = _NORM_CHUNK.get(part.values.device.type, _NORM_CHUNK_ELSEWHERE)
            for chunk in torch.split(part.values.detach().reshape(-1), size):
                tensors.append(chunk)
                places.append((part.unit, part.share))
        total = self._by_kernel(on_host) if on_host else self.zeros()
        if not by_kind:
            return total
        norms = [
            torch.stack(torch._foreach_norm(tensors, 2, torch.promote_types(dtype, torch.float32))).to(self.device)
            for (_, dtype), (tensors, _) in by_kind.items()
        ]
        return total + self.summed(torch.cat(norms), [place for _, places in by_kind.values() for place in places])

    def _by_kernel(self, parts: Sequence[Part]) -> Tensor:
        groups: dict[tuple[int, float, torch.dtype], list[Tensor]] = {}
        for part in parts:
            key = (part.unit, part.share, part.values.dtype)
            groups.setdefault(key, []).append(part.values.detach().contiguous())
        totals = [0.0] * self._num_units
        for (unit, share, _), tensors in groups.items():
            totals[unit] += share * cpu.squares_of(tensors)
        return torch.tensor(totals, dtype=torch.float64).to(self.device, non_blocking=True)

    def summed(self, norms: Tensor, places: Sequence[tuple[int, float]]) -> Tensor:
        """The sums of the squares of ``norms``, ``(n,)``, whose units and shares are in ``places``."""
        key = tuple(places)
        if self._places is None or self._places[0] != key:  # copied once for each window: a copy makes the host wait
            units, shares = zip(*key, strict=True)
            self._places = (
                key,
                torch.tensor(units, device=self.device),
                torch.tensor(shares, dtype=torch.float64, device=self.device),
            )
        _, index, share = self._places
        return self.zeros().index_add_(0, index, norms.double().square_() * share)


def _takes_kernel(values: Tensor) -> bool:
    # On the CPU torch widens 16-bit numbers in memory first, which takes several times as long.
    return values.device.type == "cpu" and values.dtype in TYPE_CODES and unavailable("cpu") is None


@dataclass(frozen=True)
class AdamStep:
    """The numbers that determine an update besides the moments."""

    step: Any
    """Updates that the moments have seen, this one included: a number, or a tensor of one element."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    """Decoupled; 0 where decay is in the gradient, and so in the moments."""


def adam_step(optimizer: Any, group: Any, state: Any, *, lr_scale: float = 1.0) -> AdamStep | None:
    """The step of ``optimizer`` on a parameter of ``group`` with ``state``; None if it is not Adam, or made none."""
    step = state.get("step", group.get("step"))
    if not is_adam(optimizer) or group.get("amsgrad") or step is None or "exp_avg" not in state:
        return None
    if not group.get("bias_correction", True):
        return None
    return AdamStep(
        step=step,
        lr=float(group["lr"]) * group.get("lr_scale", 1.0) * lr_scale,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]) if decouples(optimizer, group) else 0.0,
    )


@torch.no_grad()
def update_square(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> Tensor:
    """Squared 2-norm of the last update, computed from moments and new weights: ``()``, fp64, on the weight's device.

    The update is ``lr * (m / (sqrt(v) + eps) + weight_decay * w)`` with bias-corrected moments and the old weight. The
    old weight follows from the new one, so nothing has to be kept; a quarter of a million elements are processed at a
    time.

    Args:
        weight: After the update, in the precision that is updated: the master copy if there is one.
        exp_avg: First moment, decoded.
        exp_avg_sq: Second moment, decoded.
        step: The update's numbers.
    """
    count = torch.as_tensor(step.step, dtype=torch.float64, device=weight.device).reshape(())
    scale = (step.lr / (1 - step.beta1**count)).float()
    root = (1 - step.beta2**count).sqrt().float()
    decay = step.lr * step.weight_decay
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    parts = (torch.split(tensor.detach().reshape(-1), _UPDATE_CHUNK) for tensor in (weight, exp_avg, exp_avg_sq))
    for after, first, second in zip(*parts, strict=True):
        # scale * m / (sqrt(v) / root + eps), in place on two chunks
        update = second.float().sqrt().div_(root).add_(step.eps)
        torch.div(first.float(), update, out=update).mul_(scale)
        if decay:
            # w_before = (w_after + u) / (1 - decay), and u + decay * w_before is the update
            update.add_(after.float(), alpha=decay).div_(1 - decay)
        total += update.square_().sum()  # pairwise, where norm() would lose digits on the CPU
    return total
