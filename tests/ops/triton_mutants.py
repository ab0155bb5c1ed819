"""Triton kernels with one mistake each, to see that the tests would see it. Under the interpreter only."""

from __future__ import annotations

import triton
import triton.language as tl

from lisa_ds.ops import triton as room

_at, _right_adamw, _right_correction = room._at, room._adamw, room._correction
_right_first_step = room._first_step


@triton.jit
def _load_without_mask(address, KIND: tl.constexpr, start, i, left, MASKED: tl.constexpr):
    return tl.load(_at(address, KIND, start, i, MASKED)).to(tl.float32)


@triton.jit
def _adamw_with_coupled_decay(
    weight, gradient, first, second, factor, beta2, new1, new2, decay, rate, root, eps, EXACT: tl.constexpr
):
    """Decay added to the gradient, as Adam has it."""
    gradient = gradient + (1.0 - decay) * weight
    return _right_adamw(weight, gradient, first, second, factor, beta2, new1, new2, 1.0, rate, root, eps, EXACT)


@triton.jit
def _no_correction(step, log_beta):
    return 1.0 + 0.0 * step


@triton.jit
def _correction_for_one_history(step, log_beta):
    """That of a segment which has taken three steps, for all, as DeepSpeed's FusedAdam does."""
    return _right_correction(0.0 * step + 3.0, log_beta)


@triton.jit
def _rounded_by_cutting_off(value, KIND: tl.constexpr, ROUND_EXPLICITLY: tl.constexpr):
    """The interpreter's own cast."""
    return value.to(KIND)


@triton.jit
def _first_step_without_decay(weight, gradient, factor, decay, rate, eps):
    return _right_first_step(weight, gradient, factor, 1.0, rate, eps)


@triton.jit
def _first_step_uphill(weight, gradient, factor, decay, rate, eps):
    return _right_first_step(weight, gradient, factor, decay, -rate, eps)


@triton.jit
def _first_step_without_eps(weight, gradient, factor, decay, rate, eps):
    """The sign of the gradient, but where it is all but 0."""
    return _right_first_step(weight, gradient, factor, decay, rate, 1e-30)


MUTANTS = {
    "load mask dropped": ("_load", _load_without_mask),
    "wrong decay": ("_adamw", _adamw_with_coupled_decay),
    "no bias correction": ("_correction", _no_correction),
    "one history for all": ("_correction", _correction_for_one_history),
    "no moments, no decay": ("_first_step", _first_step_without_decay),
    "no moments, wrong sign": ("_first_step", _first_step_uphill),
    "no moments, no eps": ("_first_step", _first_step_without_eps),
    "truncating cast": ("_rounded", _rounded_by_cutting_off),
}
ARITHMETIC = ("wrong decay", "no bias correction", "one history for all")
WITHOUT_MOMENTS = ("no moments, wrong sign", "no moments, no decay", "no moments, no eps")


def install(name: str) -> None:
    """Put the mistake into the kernels of this process."""
    place, mutant = MUTANTS[name]
    setattr(room, place, mutant)
