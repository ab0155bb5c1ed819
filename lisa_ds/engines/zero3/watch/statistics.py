"""Norms of weights, gradients and updates by unit under ZeRO-3: LISA's window, or DeepSpeed's own optimizer.

Ranks add up the squares of their own partitions. Those of gradients are added up on the device at every step, before
the step clips them, without communication or host sync; a reading then all-reduces one small vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from lisa_ds.engines.common.adam import is_adam
from lisa_ds.engines.zero3 import supported
from lisa_ds.engines.zero3.optimizer.missing_gradients import STEPS
from lisa_ds.engines.zero3.optimizer.unit_norms import Part, UnitSquares, adam_step, update_square
from lisa_ds.engines.zero3.partition import own_elements
from lisa_ds.layers import LayerStack, Unit

_ATTRIBUTE = "lisa_unit_statistics"


@dataclass(frozen=True)
class Mark:
    """The start of an average over gradients."""

    squares: Tensor
    steps: tuple[int, ...]
    applied: int


@dataclass(frozen=True)
class Norms:
    """What :meth:`UnitStatistics.read` found, by unit, equal on all ranks."""

    weight: dict[Unit, float | None]
    """Norm of all weights of the unit together; None where they are not readable in memory (NVMe, quantised)."""

    gradient: dict[Unit, float | None]
    """Root mean square over the steps in which the unit trained; None if it did not."""

    update: dict[Unit, float | None]
    """Norm of what the last step added to the weights; None if the unit did not train, or not by Adam."""


class UnitStatistics:
    """Norms of what a ZeRO-3 optimizer trains; to record gradients it must be made by :func:`watch`.

    Args:
        optimizer: ``DeepSpeedZeroOptimizer_Stage3``, or the window that LISA makes of it.
        stack: The model that it trains.
    """

    def __init__(self, optimizer: Any, stack: LayerStack) -> None:
        self.units: tuple[Unit, ...] = units_of(stack)
        """The units that have parameters, in the order they run."""
        self.applied = 0
        """Steps seen, skipped ones not counted."""
        self.after_step: list[Callable[[], None]] = []
        """Called after each applied step, when its learning rate, moments and layers are still in place; on all ranks alike."""
        self._optimizer = optimizer
        self._index = {unit: i for i, unit in enumerate(self.units)}
        self._unit_of: Mapping[int, int] = {key: self._index[unit] for key, unit in stack.unit_of.items()}
        self._weights: list[Any] = [p for unit in self.units for p in stack.parameters(unit)]
        device = get_accelerator().current_device_name()  # what a collective takes, also where state is on the host
        self._of_gradients, self._of_weights = (UnitSquares(len(self.units), device) for _ in range(2))
        self._squares = self._of_gradients.zeros()  # this rank's, since the beginning
        self._steps = [0] * len(self.units)
        self._last, self._last_trained = self._of_gradients.zeros(), set[int]()  # of the step taken last
        self._step: Callable[..., Any] = optimizer.step

    def begin(self) -> None:
        """Record gradients at every step from now on."""
        self._optimizer.step = self._step_and_add

    def remove(self) -> None:
        """Stop recording."""
        self._optimizer.step = self._step
        if getattr(self._optimizer, _ATTRIBUTE, None) is self:
            delattr(self._optimizer, _ATTRIBUTE)

    def mark(self) -> Mark:
        """Mark the present step. Readings may overlap: each begins at its own mark."""
        return Mark(self._squares.clone(), tuple(self._steps), self.applied)

    def trained(self, since: Mark) -> tuple[Unit, ...]:
        """The units that have trained since ``since``."""
        pairs = zip(self.units, self._steps, since.steps, strict=True)
        return tuple(unit for unit, now, then in pairs if now > then)

    def weight_norms(self) -> dict[Unit, float]:
        """Norm of the weights of each unit, now. Every rank must call it; the numbers are the same on each."""
        squares = _reduced(self._of_weights.of([self._part(p, p.ds_tensor) for p in self._weights if _is_readable(p)]))
        return {unit: squares[i] ** 0.5 for unit, i in self._index.items()}

    def read(self, since: Mark, weights: Collection[Any] | None = None) -> Norms:
        """All norms now; gradients since ``since``. Every rank must call it, in :attr:`after_step`; the numbers are the same on each.

        Gradients are those of all ranks together, averaged, unscaled, and not clipped. Elsewhere the update would be
        computed with the learning rate of the next step.

        Args:
            since: The mark from which gradients are averaged.
            weights: The parameters whose weight norms are read; None for all of the model.
        """
        weights = self._weights if weights is None else weights
        update_squares, updated = self._update_squares()
        ours = self._of_weights.of([self._part(p, p.ds_tensor) for p in weights if _is_readable(p)])
        weight, gradient, update = _reduced(torch.stack([ours, self._squares - since.squares, update_squares]))
        unknown = {self._unit_of[id(p)] for p in weights if not _is_readable(p)}
        return Norms(
            weight={unit: None if i in unknown else weight[i] ** 0.5 for unit, i in self._index.items()},
            gradient=self._means(gradient, since),
            update={unit: update[i] ** 0.5 if i in updated else None for unit, i in self._index.items()},
        )

    def _means(self, squares: Sequence[float], since: Mark) -> dict[Unit, float | None]:
        counts = [now - then for now, then in zip(self._steps, since.steps, strict=True)]
        # A difference of sums can fall below nothing by a rounding.
        means = [
            (max(square, 0.0) / count) ** 0.5 if count else None for square, count in zip(squares, counts, strict=True)
        ]
        return dict(zip(self.units, means, strict=True))

    # ---- while it steps -------------------------------------------------------------------------------------------

    def _step_and_add(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = self._optimizer
        scale = float(optimizer.loss_scale)
        trained = {self._unit_of[id(p)] for p in _trained(optimizer)}
        squares = self._gradient_squares()
        result = self._step(*args, **kwargs)
        if optimizer.overflow:  # a skipped step is no step
            return result
        self._last = squares.mul_(scale**-2)
        self._squares += self._last
        for i in trained:
            self._steps[i] += 1
        self._last_trained = trained
        self.applied += 1
        for call in self.after_step:
            call()
        return result

    def _gradient_squares(self) -> Tensor:
        """This rank's squares, with the loss scale; read before the step, which may clip gradients in place."""
        optimizer = self._optimizer
        if optimizer.offload_optimizer:
            # Taken on the device, before the gradients went to the host.
            norms: Mapping[int, Tensor] = optimizer.norm_for_param_grads
            known = [p for p in _trained(optimizer) if optimizer.get_param_id(p) in norms]
            if not known:
                return self._of_gradients.zeros()
            values = torch.stack([norms[optimizer.get_param_id(p)].double() for p in known]).to(
                self._of_gradients.device
            )
            return self._of_gradients.summed(values, [(self._unit_of[id(p)], _share(p)) for p in known])
        partitions: Mapping[int, Tensor] = getattr(optimizer, supported.GRAD_PARTITIONS)
        return self._of_gradients.of([self._part(p, partitions[p.ds_id]) for p in _trained(optimizer)])

    # ---- when it is asked -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update_squares(self) -> tuple[Tensor, set[int]]:
        """This rank's squares, and the units whose update is known; one parameter's partition at a time."""
        optimizer, result = self._optimizer, self._of_weights.zeros()
        known: set[int] = set()
        if not is_adam(optimizer.optimizer) or optimizer.swap_optimizer:
            return result, known
        absent: Collection[int] = getattr(optimizer, "absent_of_step", ())
        scales: Sequence[float] = getattr(optimizer, "lr_scales", None) or [1.0] * len(optimizer.fp16_groups)
        for position, parameters in enumerate(optimizer.fp16_groups):
            group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[position]]
            state = optimizer.optimizer.state.get(optimizer.fp32_partitioned_groups_flat[position], {})
            step = adam_step(optimizer.optimizer, group, state, lr_scale=scales[position])
            if step is None:
                continue
            own_steps = state.get(STEPS, [step.step] * len(parameters))
            for parameter, own in zip(parameters, own_steps, strict=True):
                unit = self._unit_of[id(parameter)]
                known.add(unit)
                if parameter.ds_id in absent:
                    continue
                if count := own_elements(parameter):
                    weight, first, second = (
                        optimizer._get_fp32_opt_state_partition(parameter, True, key)[0][:count]
                        for key in (None, "exp_avg", "exp_avg_sq")
                    )
                    square = update_square(weight, first, second, replace(step, step=own)) * _share(parameter)
                    result[unit] += square.to(result.device)
        return result, known

    def _part(self, parameter: Any, partition: Tensor) -> Part:
        """``partition`` without its padding."""
        return Part(partition[: own_elements(parameter)], self._unit_of[id(parameter)], _share(parameter))


class BlockGradients:
    """The gradient norms of what is drawn, interval by interval; unlike readings between marks, they resume bit-exactly.

    Args:
        statistics: See :func:`watch`.
        num_layers: How many blocks, or matrices, there are.
    """

    def __init__(self, statistics: UnitStatistics, num_layers: int) -> None:
        self._statistics, self._num_layers = statistics, num_layers
        self._squares, self._steps = self._nothing()
        statistics.after_step.append(self._add)

    def take(self) -> list[float | None]:
        """Each block's root mean square over the steps since the last call in which it trained; None if it did in none.

        Every rank must call it; the numbers are the same on each.
        """
        squares = _reduced(self._squares)
        roots = [(square / steps) ** 0.5 if steps else None for square, steps in zip(squares, self._steps, strict=True)]
        self._squares, self._steps = self._nothing()
        return block_norms(dict(zip(self._statistics.units, roots, strict=True)), self._num_layers)

    def state_dict(self) -> dict[str, Any]:
        """What this rank has seen since the last call of :meth:`take`: plain values."""
        return {"squares": self._squares.tolist(), "steps": list(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from :meth:`state_dict`."""
        self._squares = torch.tensor(state["squares"], dtype=self._squares.dtype, device=self._squares.device)
        self._steps = list(state["steps"])

    def _nothing(self) -> tuple[Tensor, list[int]]:
        return torch.zeros_like(self._statistics._last), [0] * len(self._statistics.units)

    def _add(self) -> None:
        self._squares += self._statistics._last
        for i in self._statistics._last_trained:
            self._steps[i] += 1


def watch(optimizer: Any, stack: LayerStack) -> UnitStatistics:
    """The statistics of ``optimizer``, made on the first call: one object for each optimizer.

    Args:
        optimizer: ``DeepSpeedZeroOptimizer_Stage3``, or the window that LISA makes of it.
        stack: The model that it trains.

    Raises:
        EngineError: DeepSpeed's optimizer lacks an attribute that this needs.
    """
    found: UnitStatistics | None = getattr(optimizer, _ATTRIBUTE, None)
    if found is None:
        supported.check_attributes(optimizer)
        found = UnitStatistics(optimizer, stack)
        found.begin()
        setattr(optimizer, _ATTRIBUTE, found)
    return found


def block_norms(norms: Mapping[Unit, float | None], num_layers: int) -> list[float | None]:
    """The norms of the blocks, in order, out of norms by unit."""
    return [norms.get(layer) for layer in range(num_layers)]


def units_of(stack: LayerStack) -> tuple[Unit, ...]:
    """The units of a model that have parameters, in the order they run."""
    every: tuple[Unit, ...] = ("embeddings", *range(len(stack.units)), "block_rest", "adapters", "lm_head", "rest")
    return tuple(unit for unit in every if stack.parameters(unit))


def _trained(optimizer: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(optimizer.fp16_groups)


def _is_readable(parameter: Any) -> bool:
    partition = parameter.ds_tensor
    return bool(partition.is_floating_point() and partition.numel() >= partition.ds_numel)  # NVMe leaves nothing here


def _share(parameter: Any) -> float:
    """1 / n where n groups of ranks each partition a copy of ``parameter``, such as a norm under tensor parallelism."""
    if is_model_parallel_parameter(parameter):
        return 1.0
    return float(dist.get_world_size(parameter.ds_process_group)) / float(dist.get_world_size())


def _reduced(squares: Tensor) -> Any:
    """Sums over all ranks, as numbers."""
    total = squares.clone()
    dist.all_reduce(total)
    return total.tolist()
