"""Tracks which parameters had a gradient since the last step: one without is not stepped, as in ``torch.optim.AdamW``.

Note on what Stage 3 does.
    It keeps gradients in one buffer, where the first gradient after a step overwrites the old one. A parameter that
    gets none (in a vision tower on a batch of text, in a branch not taken) is stepped all the same: with zeros, so that
    weight decay and the decay of moments go on, or, if it ever had a gradient, with that one again and again. A
    gradient that comes only in a later micro-batch is added to the old one, and under CPU offload one that comes only
    in an earlier micro-batch is lost.

Note on what ranks know.
    The hooks that reduce gradients run on the host, and a reduction is of the same parameters on all ranks, so no
    communication and no device sync is needed. Leaf modules are the exception: DeepSpeed reduces zeros for their
    parameters without a gradient, so one small all-reduce per step, if the window holds such a module, tells which
    parameters have a gradient on some rank.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import z3_leaf_parameter
from torch import Tensor

from lisa_ds.engines.zero3 import supported

logger = logging.getLogger("lisa_ds")

STEPS = "steps"
"""Key in the state of a sub-group beside ``step``: the steps of each of its parameters, ``(parameters,)``, float32;
only once they differ."""


class MissingGradientsStage3(DeepSpeedZeroOptimizer_Stage3):
    """Stage 3 in which a parameter without a gradient is not stepped."""

    averaged_gradients: dict[int, Any]
    fp16_groups: list[list[Any]]
    fp32_partitioned_groups_flat: list[Tensor]
    norm_for_param_grads: dict[int, Tensor]

    def watch_gradients(self) -> None:
        """Start tracking, with no gradient yet; called before the gradient buffer is allocated."""
        self._come: set[int] = set()  # ds_id of each parameter with a gradient since the last step,
        self._at_boundary: set[int] = set()  # in the last of its micro-batches,
        self._in_leaf: set[int] = set()  # and in a leaf module, of autograd
        self._written: set[int] = set()  # whose slice of the buffer may hold other than zeros
        self._absent: frozenset[int] | None = None  # of the window, without a gradient; None while they may come
        self._dropped = False  # by zero_grad: they are there for a step that follows at once, as in the base class
        self._told_whole = False

    @property
    def absent(self) -> frozenset[int]:
        """``ds_id`` of each parameter of the window without a gradient in the current step."""
        return self._absent or frozenset()

    def create_reduce_and_remove_grad_hooks(self) -> None:
        """See the base class; in leaf modules, also records gradients before DeepSpeed adds zeros for missing ones."""
        leaves: dict[Any, list[Any]] = {}
        for parameter in itertools.chain.from_iterable(self.fp16_groups):
            if z3_leaf_parameter(parameter):
                leaves.setdefault(parameter.ds_z3_leaf_module, []).append(parameter)
        for module, parameters in leaves.items():
            module.register_full_backward_hook(lambda *_, parameters=parameters: self._see_leaf(parameters))
        super().create_reduce_and_remove_grad_hooks()

    def _see_leaf(self, parameters: Sequence[Any]) -> None:
        self._forget_dropped()
        self._in_leaf.update(parameter.ds_id for parameter in parameters if parameter.grad is not None)

    def _forget_dropped(self) -> None:
        if self._dropped:
            self.begin_gradients()

    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> Any:
        """See the base class; records which gradients have come, and adds none to those of the last step."""
        self._forget_dropped()
        new = {parameter.ds_id for parameter in params_to_release} - self._come
        if self.micro_step_id:  # else they are overwritten
            self._clear(new)
        self._come |= new
        self._written |= new
        self._absent = None
        if self.is_gradient_accumulation_boundary():
            self._at_boundary.update(parameter.ds_id for parameter in params_to_release)
        return super().partition_grads(params_to_release, grad_partitions)

    @torch.no_grad()
    def settle_gradients(self) -> None:
        """Called when all gradients of a step have come: find parameters without one, and zero their old gradients."""
        if self._absent is not None:
            return
        window = {parameter.ds_id: parameter for parameter in itertools.chain.from_iterable(self.fp16_groups)}
        absent = (window.keys() - self._come) | self._absent_in_leaves(window)
        self._clear(absent)
        if self.offload_optimizer:
            self._bring_to_host([window[i] for i in sorted((window.keys() & self._come) - self._at_boundary)])
        self._absent = frozenset(absent)

    def begin_gradients(self) -> None:
        """Called when a step was taken or skipped: the next gradients belong to a new step."""
        self._come.clear()
        self._at_boundary.clear()
        self._in_leaf.clear()
        self._absent = None
        self._dropped = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See the base class."""
        self._dropped = self._absent is None  # and not in the middle of a step
        super().zero_grad(set_to_none)

    def _absent_in_leaves(self, window: dict[int, Any]) -> set[int]:
        leaf = [i for i in sorted(window) if i in self._come and z3_leaf_parameter(window[i])]
        if not leaf:
            return set()
        device = get_accelerator().current_device_name()
        present = torch.tensor([i in self._in_leaf for i in leaf], dtype=torch.int32, device=device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX)
        return {i for i, anywhere in zip(leaf, present.tolist(), strict=True) if not anywhere}

    def _clear(self, identifiers: set[int] | frozenset[int]) -> None:
        """Zero the gradients that these parameters had in an earlier step."""
        if not (stale := self._written & identifiers):
            return
        partitions: dict[int, Tensor] = getattr(self, supported.GRAD_PARTITIONS)
        torch._foreach_zero_([partitions[i] for i in sorted(stale)])
        self._written -= stale
        if self.offload_optimizer:
            for parameter in itertools.chain.from_iterable(self.fp16_groups):
                if parameter.ds_id in stale:
                    position, offset, size = self.grad_position[self.get_param_id(parameter)]
                    gradient = self.fp32_partitioned_groups_flat[position].grad
                    assert gradient is not None
                    gradient.narrow(0, offset, size).zero_()
                    self.norm_for_param_grads.pop(self.get_param_id(parameter), None)

    def _bring_to_host(self, parameters: Sequence[Any]) -> None:
        """Copy these gradients to the host; the base class copies only those that come in the last micro-batch."""
        partitions: dict[int, Tensor] = getattr(self, supported.GRAD_PARTITIONS)
        for parameter in parameters:
            if parameter.partition_numel() * self._get_param_partition_rank(parameter) < parameter.ds_numel:
                gradient = partitions[parameter.ds_id].to(get_accelerator().current_device_name())
                self._offload_grad_partition_at_boundary(parameter, gradient, {}, {})

    # ---- an optimizer's own step, of a part of a sub-group --------------------------------------------------------

    def slices(self, sub_group_id: int) -> Iterator[tuple[Any, slice]]:
        """The parameters of a sub-group, and the slice of each one's partition in it."""
        offset = 0
        for parameter in self.fp16_groups[sub_group_id]:
            size = parameter.partition_numel()
            yield parameter, slice(offset, offset + size)
            offset += size

    def _optimizer_step(self, sub_group_id: int) -> None:
        """See the base class; if some parameters have or had no gradient, the others are stepped one by one."""
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        parameters = self.fp16_groups[sub_group_id]
        missing = [parameter for parameter in parameters if parameter.ds_id in self.absent]
        state = self.optimizer.state.get(master) or {}
        if len(missing) == len(parameters):
            return
        if not missing and STEPS not in state:
            super()._optimizer_step(sub_group_id)
        elif not _divisible(state, master):
            self._tell_whole()
            super()._optimizer_step(sub_group_id)
        else:
            self._step_apart(sub_group_id, state)

    def _step_apart(self, sub_group_id: int, state: dict[str, Any]) -> None:
        master, optimizer = self.fp32_partitioned_groups_flat[sub_group_id], self.optimizer
        assert master.grad is not None
        steps: Tensor = state.get(
            STEPS, torch.full((len(self.fp16_groups[sub_group_id]),), float(state.get("step", 0)))
        )
        known, state = bool(state), dict(state)
        for i, (parameter, part) in enumerate(self.slices(sub_group_id)):
            if parameter.ds_id in self.absent:
                continue
            piece = torch.nn.Parameter(master.detach()[part])
            piece.grad = master.grad[part]
            if known:
                own = {k: v[part] if _is_flat(v, master) else v for k, v in state.items() if k != STEPS}
                optimizer.state[piece] = {**own, "step": _like(own.get("step"), steps[i])}
            self.fp32_partitioned_groups_flat[sub_group_id] = piece
            try:
                super()._optimizer_step(sub_group_id)
            finally:
                self.fp32_partitioned_groups_flat[sub_group_id] = master
            after = optimizer.state.pop(piece)
            steps[i] = float(after["step"])
            for key, value in after.items():  # in place where the state was there
                if key not in state and _is_flat(value, piece):
                    state[key] = torch.zeros_like(master, dtype=value.dtype, requires_grad=False)
                if not _is_flat(value, piece):
                    state[key] = value
                elif not known:
                    state[key][part] = value
        state[STEPS] = steps
        state["step"] = _like(state["step"], steps.max())
        optimizer.state[master] = state

    def _tell_whole(self) -> None:
        if not self._told_whole:
            self._told_whole = True
            logger.warning(
                "some parameters got no gradient, and are stepped with zeros: the state of %s cannot be divided between "
                "parameters. lisa.optimizer 'masked_adamw' leaves them as they are",
                type(self.optimizer).__name__,
            )


def _is_flat(value: Any, whole: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == whole.numel()


def _divisible(state: dict[str, Any], master: Tensor) -> bool:
    """Whether each element of ``master`` has its own state, but for a step count."""
    others = [v for k, v in state.items() if k not in ("step", STEPS) and isinstance(v, Tensor)]
    return all(_is_flat(value, master) for value in others) and ("step" in state or not state)


def _like(template: Any, value: Tensor) -> Any:
    """``value`` as a step count of the same type as ``template``."""
    if isinstance(template, Tensor):
        return torch.full_like(template, float(value))
    return int(value)
