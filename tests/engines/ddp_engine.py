"""A second engine, of plain torch DDP: it knows nothing of DeepSpeed, and what engines have in common nothing of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lisa_ds.config import LisaConfig
from lisa_ds.engines.common import policies
from lisa_ds.engines.common.backward_start import BackwardStart
from lisa_ds.engines.common.draws import Draws
from lisa_ds.engines.common.protocol import Collectives
from lisa_ds.engines.common.run import LisaRun
from lisa_ds.layers import ROLES, LayerStack, Unit
from tests.zero3 import trajectory
from tests.zero3.trajectory import Case


class DdpEngine:
    """Every rank holds the whole model; optimizers exist for the units that train."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.model, self._case = model, case
        config = LisaConfig.load(case.lisa_config)
        self._stack = LayerStack.from_model(model)
        owned = {id(parameter) for parameter in model.parameters()}
        frozen = policies.apply(self._stack, config, owned)
        tied, layers = self._stack.tied, len(self._stack.layers)
        self.run = LisaRun(config, num_layers=layers, tied=tied, frozen=frozen, steps_per_epoch=None)
        self._trainable = {
            unit: [parameter for parameter in self._stack.parameters(unit) if parameter.requires_grad]
            for unit in (*range(layers), *ROLES)
        }
        self._role_scales = policies.lr_scales(config)
        self._lr_scales: Mapping[int, float] = {}
        self._optimizers: dict[Unit, torch.optim.AdamW] = {}
        self._backward_start = BackwardStart(model, self._stack)
        self._layers: tuple[int, ...] = ()
        self._roles: tuple[str, ...] = ()
        self.train_units(self.run.history[0], self.run.roles_at(0))
        add, maximum = dist.all_reduce, lambda tensor: dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        self.ranks = Collectives(add, maximum, texts, device=torch.device("cpu"))
        fed: Any = {"measure": lambda: [1.0] * layers, "gradients": None, "affords": lambda count: True}
        self.run.begin(Draws(self.run.sampler, **fed, ranks=self.ranks))
        self.run.scale_rates(self)

    @property
    def sampled_layers(self) -> tuple[int, ...]:
        return self._layers

    @property
    def sampled_roles(self) -> tuple[str, ...]:
        return self._roles

    def present(self, roles: Iterable[str]) -> tuple[str, ...]:
        return tuple(role for role in ROLES if role in set(roles) and self._trainable[role])

    def train_units(self, layers: Collection[int], roles: Collection[str]) -> None:
        self._layers, self._roles = tuple(layers), self.present(roles)
        units: tuple[Unit, ...] = (*self._layers, *self._roles)
        for unit, parameters in self._trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(unit in units)
        self._optimizers = {unit: self._optimizers.get(unit) or self._optimizer(unit) for unit in units}
        self.run.rewarm.keep(units)
        self.run.growth_limit.keep(units)
        self._backward_start.move(self._layers)
        self._replica = DistributedDataParallel(self.model)  # it sees who requires grad when it is built

    def set_lr_scales(self, scales: Mapping[int, float]) -> None:
        self._lr_scales = scales

    def memory_report(self) -> dict[str, int]:
        moments = [state["exp_avg"] for o in self._optimizers.values() for state in o.state.values()]
        return {"exp_avg": sum(moment.numel() * moment.element_size() for moment in moments)}

    def unit_squares(self) -> dict[Unit, Tensor]:
        whole = {unit: torch.cat([g.flatten() for g in self._gradients(unit)]) for unit in self._optimizers}
        return {unit: gradient.norm().double().square() for unit, gradient in whole.items()}

    def state_of(self, unit: Unit) -> list[dict[str, Any]]:
        optimizer = self._optimizers.get(unit)
        return [optimizer.state.get(parameter, {}) for parameter in self._trainable[unit]] if optimizer else []

    def _gradients(self, unit: Unit) -> list[Tensor]:
        return [parameter.grad for parameter in self._trainable[unit] if parameter.grad is not None]

    def _optimizer(self, unit: Unit) -> torch.optim.AdamW:
        groups = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in self._trainable[unit]]
        return torch.optim.AdamW(groups, lr=1e-3, eps=trajectory.EPS, foreach=False)

    def backward(self, rows: Tensor) -> float:
        if "embeddings" not in self._roles:
            self._backward_start.refresh()
        loss = self._replica(input_ids=rows, labels=rows).loss
        (loss / self._case.accumulation).backward()
        return float(loss)

    @torch.no_grad()
    def step(self) -> float:
        squares = self.unit_squares()
        order, norms = list(squares), torch.stack(list(squares.values())).sqrt()
        if self.run.growth_limit.factor is not None:
            norms = self.run.growth_limit.limit(order, norms)
        norm = float(norms.norm())
        clip = min(1.0, self._case.clip / (norm + 1e-6)) if self._case.clip else 1.0
        rate = 1e-3 / (1 + self.run.step) if self._case.scheduler else 1e-3
        for unit, optimizer in self._optimizers.items():
            factor = self.run.growth_limit.of(unit)
            torch._foreach_mul_(self._gradients(unit), clip * (1.0 if factor is None else float(factor)))
            own = self._lr_scales.get(unit, 1.0) if isinstance(unit, int) else self._role_scales[unit]
            for group in optimizer.param_groups:
                group["lr"] = rate * own * self.run.rewarm.share(unit)
            optimizer.step()
            optimizer.zero_grad()
        self.run.rewarm.stepped()
        self.run.growth_limit.stepped()
        self.run.stepped(self)
        return norm


def texts(own: str) -> list[str]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
