"""``MaskedAdamW``: AdamW as one kernel launch over every parameter with a gradient; and the formats of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, overload

import torch
from torch import Tensor

from lisa_ds.config.formats import QUANT_BLOCK, Weights
from lisa_ds.errors import EngineError
from lisa_ds.ops import Backend, Hyper, Segment, SegmentTable, masked_adamw_, sum_of_squares
from lisa_ds.ops.reference import dequantise_signed, dequantise_unsigned, quantise_signed, quantise_unsigned
from lisa_ds.ops.segments import capturing

_MOMENT_TYPES = {
    "fp32": (torch.float32,) * 2,
    "bf16": (torch.bfloat16,) * 2,
    "int8": (torch.int8, torch.uint8),
    "none": None,
}
_PRECISIONS = get_args(Weights)
_KEPT_TABLES = 8  # of what was frozen and unfrozen in turn; they hold no tensors but their own


@dataclass(frozen=True)
class StateFormat:
    """The format of optimizer state: master copy or not, and the type of the moments.

    Bytes read and written for an element of a bf16 weight with a bf16 gradient: ``mixed`` 28, with 8-bit moments 16,
    without moments 12; ``stochastic_rounding`` 22, with bf16 moments 14, with 8-bit moments 10, without moments 6.

    Raises:
        ValueError: An unknown name, or two that do not go together.
    """

    precision: str = "mixed"
    """``mixed``: 16-bit weights have an fp32 master copy. ``stochastic_rounding``: bf16 weights have none, and are rounded up or
    down at random so that small updates count on average. fp32 weights are updated in place either way."""

    moments: str = "fp32"
    """``fp32``, ``bf16`` (stochastic rounding only), ``int8``: 8-bit codes, with a scale for each 256; or ``none``: every step is the
    first one of AdamW, ``lr * g / (|g| + eps)`` and decay, and betas have no effect."""

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision: should be one of {', '.join(_PRECISIONS)}, got {self.precision!r}")
        if self.moments not in _MOMENT_TYPES:
            raise ValueError(f"moments: should be one of {', '.join(_MOMENT_TYPES)}, got {self.moments!r}")
        if self.precision == "mixed" and self.moments == "bf16":
            raise ValueError("moments: 'bf16' goes with precision 'stochastic_rounding'; use 'fp32', 'int8' or 'none'")

    def has_master(self, weight: torch.dtype) -> bool:
        """Whether a weight of this type has a master copy.

        Raises:
            ValueError: It is float16, which is not rounded stochastically.
        """
        if self.precision == "stochastic_rounding" and weight == torch.float16:
            raise ValueError("precision 'stochastic_rounding' takes bfloat16 weights, got float16; use 'mixed'")
        return weight != torch.float32 and self.precision == "mixed"

    def moments_of(self, weight: torch.dtype) -> str:
        """The format of the moments of a weight of this type: never bf16 for fp32 weights, which are not rounded."""
        return "fp32" if weight == torch.float32 and self.moments == "bf16" else self.moments

    def new_moments(self, weight: Tensor, sizes: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Zero moments and step count, under the names that ``torch.optim.AdamW`` gives them; only ``step`` with moments ``none``.

        Args:
            weight: The weight they are for; ``(numel,)`` or any shape.
            sizes: Elements of the segments that it consists of, if of more than one: each has scales of its own.
        """
        kind = self.moments_of(weight.dtype)
        state = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
        types = _MOMENT_TYPES[kind]
        if types is None:
            return state
        for key, dtype in zip(("exp_avg", "exp_avg_sq"), types, strict=True):
            state[key] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        if kind == "int8":
            count = sum(-(-size // QUANT_BLOCK) for size in (sizes or [weight.numel()]))
            for key in ("exp_avg_scale", "exp_avg_sq_scale"):
                state[key] = torch.zeros(count, dtype=torch.float32, device=weight.device)
        return state


class MaskedAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` in one launch: parameters without a gradient have no state, and are not read or written.

    Each parameter counts its own steps, so one that was frozen for a while is corrected for its own history. Loss scale, clip
    coefficient and an overflow are read on the device: with ``torch.amp.GradScaler``, or captured in a CUDA graph, nothing waits.
    Replays of a captured step follow a rate that is a tensor; the other hyperparameters are those of the capture.

    Args:
        params: As for every optimizer: tensors, or groups with ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``lr_scale``.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        precision: ``mixed`` or ``stochastic_rounding``, see :class:`StateFormat`.
        moments: ``fp32``, ``bf16``, ``int8`` or ``none``, likewise.
        max_grad_norm: Clip gradients to this global norm inside the step, which is skipped where the norm is not finite.
        seed: Seed of stochastic rounding.
        backend: ``reference``, ``cpu``, ``triton`` or ``cuda``; None for the best that is available.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = MaskedAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.9000, 0.9000, 0.9000])
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then hands over `grad_scale` and `found_inf`

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        precision: str = "mixed",
        moments: str = "fp32",
        max_grad_norm: float | None = None,
        seed: int = 0,
        backend: Backend | None = None,
    ) -> None:
        self.format = StateFormat(precision, moments)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        """Norm of all gradients before clipping at the last step, with ``max_grad_norm`` only: ``()``, on the device."""
        self._seed, self._backend = seed, backend
        self._launches: dict[Any, SegmentTable] = {}
        self._captured: list[SegmentTable] = []  # CUDA graphs read them as long as they are replayed
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lr_scale": 1.0}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.format.has_master(parameter.dtype)  # refuses what it does not take

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; one launch for each combination of types and devices.

        Raises:
            ValueError: A parameter is not contiguous, or its gradient is sparse.
            EngineError: A CUDA graph is captured, and a rate is a number, or it is the first step of these parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [self._launch(key, chosen) for key, chosen in self._with_gradient().items()]
        if not tables:
            return loss
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        factor = None if scale is None else 1.0 / scale.reshape(()).float()
        if self.max_grad_norm is not None:
            factor, found_inf = self._clip(tables, self.max_grad_norm, factor, found_inf)
        for table in tables:
            masked_adamw_(
                table,
                factor=None if factor is None else factor.to(table.device),
                found_inf=None if found_inf is None else found_inf.to(table.device).reshape(()),
                backend=self._backend,
            )
            table.let_go()  # of gradients above all, which backward would have to make room beside
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See ``torch.optim.Optimizer``. State of ``torch.optim.AdamW`` is taken as well, and so is another format's.

        Moments that are not kept here are dropped. Where the state has none and this format does, moments and step count begin at
        zero: with the saved count, zero moments would pass for a long history and go uncorrected.
        """
        super().load_state_dict(dict(state_dict))
        # The base class casts state to the parameter's type: fp32 moments of a bf16 weight would lose their low bits.
        saved = state_dict["state"]
        identifiers = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for identifier, parameter in zip(identifiers, parameters, strict=True):
            if identifier in saved:
                self.state[parameter] = self._converted(saved[identifier], parameter)

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy`` and ``pickle``: the attributes of torch's base class, and those of this one."""
        ours = ("format", "max_grad_norm", "grad_norm", "_seed", "_backend")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See the base class; also called with loaded state."""
        super().__setstate__(state)
        self._launches, self._captured = {}, []

    def _with_gradient(self) -> dict[Any, list[tuple[Tensor, dict[str, Any], int]]]:
        """Parameters with a gradient, their group and number, grouped by what may share a launch."""
        chosen: dict[Any, list[tuple[Tensor, dict[str, Any], int]]] = {}
        number = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ValueError("MaskedAdamW takes dense gradients; use torch.optim.SparseAdam for sparse ones")
                key = (parameter.device, parameter.dtype, parameter.grad.dtype)
                chosen.setdefault(key, []).append((parameter, group, number))
        return chosen

    def _launch(self, key: Any, chosen: list[tuple[Tensor, dict[str, Any], int]]) -> SegmentTable:
        """The table over ``chosen``: the last step's if it had the same sizes, pointed at the tensors of this step."""
        device = key[0]
        key = (*key, *((number, parameter.numel()) for parameter, _, number in chosen))
        table = self._launches.get(key)
        if capturing(device):
            self._refuse_to_capture(device, first=table is None)
            # The graph's own from now on: a step outside of it must not point it elsewhere.
            self._captured.append(self._launches.pop(key))
        segments = []
        for parameter, _, number in chosen:
            if not parameter.is_contiguous():
                raise ValueError(f"parameter {number} of shape {tuple(parameter.shape)} is not contiguous in memory")
            state = self.state[parameter]
            if not state:
                state.update(self.format.new_moments(parameter))
            if self.format.has_master(parameter.dtype) and "master" not in state:
                state["master"] = parameter.detach().float()
            segments.append(Segment(weight=parameter.detach(), grad=_gradient(parameter), stream=number, **state))
        hypers = [_hyper(group) for _, group, _ in chosen]
        if table is None:
            table = SegmentTable(segments, hypers, seed=self._seed)
            self._launches = {**self._launches, key: table} if len(self._launches) < _KEPT_TABLES else {key: table}
        else:
            table.point_at(segments)
            table.set_hypers(hypers)
        return table

    def _refuse_to_capture(self, device: torch.device, *, first: bool) -> None:
        for i, group in enumerate(self.param_groups):
            if not isinstance(lr := group["lr"], Tensor):
                raise EngineError(
                    f"param_groups[{i}]['lr'] is the number {lr}, which a captured step would repeat whatever it is set to later; "
                    f"give it as a tensor, which replays read: lr=torch.tensor({lr}, device='{device}')"
                )
        if first:
            raise EngineError(
                "the first step of these parameters cannot be captured in a CUDA graph; take one, then capture the next"
            )

    def _clip(
        self, tables: Sequence[SegmentTable], limit: float, factor: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        device = tables[0].device
        squares = [sum_of_squares(table, backend=self._backend).to(device) for table in tables]
        norm = torch.stack(squares).sum().sqrt().float()
        if factor is not None:
            norm = norm * factor.to(device)
        self.grad_norm = norm
        coefficient = torch.clamp(limit / (norm + 1e-6), max=1.0)
        bad = (~norm.isfinite()).float()
        if found_inf is not None:
            bad = torch.maximum(bad, found_inf.to(device).reshape(()))
        return coefficient if factor is None else coefficient * factor.to(device), bad

    def _converted(self, saved: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """State of any format, converted to this optimizer's."""
        saved = {key: value.detach() if isinstance(value, Tensor) else value for key, value in saved.items()}
        state = self.format.new_moments(parameter)
        if "exp_avg" not in state:
            state["step"].fill_(float(saved["step"]))
        elif saved.keys() - {"step", "master"}:  # else there were no moments, and no steps that these ones have seen
            state["step"].fill_(float(saved["step"]))
            _read_moments(saved, state)
        if (
            self.format.has_master(parameter.dtype) and "master" in saved
        ):  # else it is made of the weight at the next step
            state["master"] = saved["master"].to(parameter.device, torch.float32, copy=True)
        return state


def _read_moments(saved: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Fill the moments of ``state`` with those of ``saved``, converted from one format to the other."""
    quantised = saved["exp_avg"].dtype == torch.int8
    for key, decode, encode in (
        ("exp_avg", dequantise_signed, quantise_signed),
        ("exp_avg_sq", dequantise_unsigned, quantise_unsigned),
    ):
        kept, value = state[key], saved[key].to(state[key].device)
        if quantised and "exp_avg_scale" in state:
            kept.copy_(value)
            state[f"{key}_scale"].copy_(saved[f"{key}_scale"])
            continue
        if quantised:
            value = decode(value.reshape(-1), saved[f"{key}_scale"].to(kept.device)).view(kept.shape)
        if "exp_avg_scale" in state:
            codes, scales = encode(value.reshape(-1).float())
            kept.copy_(codes.view(kept.shape))
            state[f"{key}_scale"].copy_(scales)
        else:
            kept.copy_(value)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach().contiguous()


def _hyper(group: Mapping[str, Any]) -> Hyper:
    if group.get("amsgrad") or group.get("maximize"):
        raise ValueError("MaskedAdamW has neither amsgrad nor maximize; turn them off in the parameter groups")
    return Hyper(
        lr=group["lr"],
        betas=tuple(group["betas"]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        lr_scale=group.get("lr_scale", 1.0),
    )
