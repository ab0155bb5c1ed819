"""Builds GaLore's optimizer for a trainer: galore-torch's classes, with everything that ``TrainingArguments`` says of AdamW."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lisa_ds.config.formats import GALORE_CHUNK, QUANT_BLOCK, SMALLEST_INT8
from lisa_ds.ops.reference import dequantise_signed, dequantise_unsigned, quantise_signed, quantise_unsigned


def install(
    trainer: Any, projected: Sequence[nn.Parameter], *, projection: Mapping[str, Any], int8: bool, layerwise: bool
) -> None:
    """Have ``trainer`` train by GaLore.

    Args:
        trainer: A ``transformers.Trainer`` without DeepSpeed that has not trained yet.
        projected: The weights whose gradients are projected.
        projection: galore-torch's ``rank``, ``update_proj_gap``, ``scale`` and ``proj_type``.
        int8: Whether moments are kept in 8 bits.
        layerwise: Whether each parameter is stepped as soon as its gradient is there.
    """
    if trainer.args.world_size == 1:
        # One rank of a launcher: accelerate would wrap the model in DDP, whose buckets copy every gradient.
        trainer.accelerator.state.distributed_type = DistributedType.NO
    stock = trainer.create_optimizer

    @functools.wraps(stock)
    def create(*args: Any, **kwargs: Any) -> Any:
        if trainer.optimizer is None:
            trainer.optimizer = _build(trainer, projected, projection, int8=int8)
            if layerwise:
                step_in_backward(trainer.optimizer)
        return trainer.optimizer

    trainer.create_optimizer = create


def _build(trainer: Any, projected: Sequence[nn.Parameter], projection: Mapping[str, Any], *, int8: bool) -> Any:
    from galore_torch import GaLoreAdamW, GaLoreAdamW8bit

    from lisa_ds.integrations.galore_projector import Projector

    args, low = trainer.args, {id(weight) for weight in projected}
    decays = set(trainer.get_decay_parameter_names(trainer.model))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in low, name in decays), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "weight_decay": args.weight_decay if decayed else 0.0,
            **(projection if is_low else {}),
        }
        for (is_low, decayed), parameters in groups.items()
    ]
    common = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the base class of GaLoreAdamW, which it replaces
        on_gpu = args.device.type == "cuda"
        optimizer = (GaLoreAdamW if not int8 else GaLoreAdamW8bit if on_gpu else Int8)(settings, **common)
    for weight in projected:  # where each finds its own, it makes none
        optimizer.state[weight]["projector"] = Projector(**projection)
    torch.serialization.add_safe_globals([Projector])  # torch.load reads no other objects
    return optimizer


def step_in_backward(optimizer: Any) -> None:
    """Step each parameter when its gradient has been computed, and let go of the gradient; ``optimizer.step`` does nothing.

    Learning rates are those of the optimizer's groups at that time, so any scheduler works, and state is saved and loaded as without.
    """
    stock = optimizer.step
    groups = [
        (number, parameter) for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]
    ]
    group_of = {id(parameter): number for number, parameter in groups}

    def stepped(parameter: nn.Parameter) -> None:
        whole = optimizer.param_groups  # looked up anew: loading state makes new ones
        optimizer.param_groups = [{**whole[group_of[id(parameter)]], "params": [parameter]}]
        try:
            stock()
        finally:
            optimizer.param_groups = whole
        parameter.grad = None

    for _, parameter in groups:
        parameter.register_post_accumulate_grad_hook(stepped)
    optimizer.step = types.MethodType(_nothing_left, optimizer)


def _nothing_left(optimizer: Any, closure: Any = None) -> None:
    """A step of an optimizer that has stepped every parameter in backward."""


class Int8(torch.optim.Optimizer):
    """GaLore's AdamW with both moments in 8 bits, by this package's format: codes with a scale for each 256 elements.

    Each step is that of galore-torch's ``AdamW``, in fp32, on moments that were decoded and are encoded again.

    Args:
        params: Groups. The gradient of a parameter whose state has a ``projector`` is projected.
        lr: The learning rate.
        betas: Coefficients of the two averages.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, after the update as in galore-torch.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def load_state_dict(self, state_dict: Any) -> None:
        """See ``torch.optim.Optimizer``, which by itself would cast codes and scales to the parameter's type."""
        super().load_state_dict(state_dict)
        identifiers = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for identifier, parameter in zip(identifiers, parameters, strict=True):
            for key, value in state_dict["state"].get(identifier, {}).items():
                if torch.is_tensor(value):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        step: int = state.setdefault("step", 0)
        projector = state.get("projector")
        if projector is not None:
            gradient = projector.project(gradient, step)
        (beta1, beta2), step = group["betas"], step + 1
        rate = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        if "exp_avg" not in state:
            state.update(_zeros(gradient))
        in_place = projector is None and parameter.is_contiguous()
        update = (
            parameter.view(-1) if in_place else torch.empty_like(gradient, dtype=parameter.dtype).contiguous().view(-1)
        )
        flat = gradient.reshape(-1)
        for begin in range(
            0, flat.numel(), GALORE_CHUNK
        ):  # whole moments in fp32 would take four times the weights of an embedding
            part = slice(begin, min(begin + GALORE_CHUNK, flat.numel()))
            piece = flat[part].float()
            first, second = _decoded(state, part)
            first = first.mul(beta1).add_(piece, alpha=1 - beta1)
            second = second.mul(beta2).addcmul_(piece, piece, value=1 - beta2)
            _encode(state, part, first, second)
            made = first.div_(second.sqrt_().add_(group["eps"])).to(parameter.dtype)
            if in_place:
                update[part].add_(made, alpha=-rate)
            else:
                update[part] = made
        if not in_place:
            whole = update.view(gradient.shape)
            parameter.add_(whole if projector is None else projector.project_back(whole), alpha=-rate)
        if group["weight_decay"] > 0:
            parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
        state["step"] = step


def _zeros(gradient: Tensor) -> dict[str, Tensor]:
    """The moments before the first step."""
    numel, scales = gradient.numel(), -(-gradient.numel() // QUANT_BLOCK)
    if numel < SMALLEST_INT8:
        return {key: torch.zeros_like(gradient, dtype=torch.float32).contiguous() for key in ("exp_avg", "exp_avg_sq")}
    return {
        "exp_avg": gradient.new_zeros(numel, dtype=torch.int8),
        "exp_avg_scale": gradient.new_zeros(scales, dtype=torch.float32),
        "exp_avg_sq": gradient.new_zeros(numel, dtype=torch.uint8),
        "exp_avg_sq_scale": gradient.new_zeros(scales, dtype=torch.float32),
    }


def _decoded(state: Mapping[str, Any], part: slice) -> tuple[Tensor, Tensor]:
    """A part of the two moments in fp32."""
    first, second = state["exp_avg"].view(-1)[part], state["exp_avg_sq"].view(-1)[part]
    if "exp_avg_scale" not in state:
        return first, second
    scales = _scales(part)
    return (
        dequantise_signed(first, state["exp_avg_scale"][scales]),
        dequantise_unsigned(second, state["exp_avg_sq_scale"][scales]),
    )


def _encode(state: Mapping[str, Any], part: slice, first: Tensor, second: Tensor) -> None:
    if "exp_avg_scale" not in state:
        state["exp_avg"].view(-1)[part], state["exp_avg_sq"].view(-1)[part] = first, second
        return
    for key, (codes, scales) in (("exp_avg", quantise_signed(first)), ("exp_avg_sq", quantise_unsigned(second))):
        state[key][part], state[f"{key}_scale"][_scales(part)] = codes, scales


def _scales(part: slice) -> slice:
    return slice(part.start // QUANT_BLOCK, -(-part.stop // QUANT_BLOCK))
