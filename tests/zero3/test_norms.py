"""Norms of many tensors by unit, and of an update from what it has left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lisa_ds.engines.common.adam import is_adam, not_adamw
from lisa_ds.engines.zero3.optimizer import unit_norms
from lisa_ds.engines.zero3.optimizer.unit_norms import Part, UnitSquares, adam_step, update_square
from lisa_ds.optim import MaskedAdamW

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("kernel", [True, False])
def test_squares_are_added_up_by_unit_and_share(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, a size beyond a chunk, nothing at all, and every type a model may be of."""
    if not kernel:  # as on a device, or without a compiler
        monkeypatch.setattr(unit_norms, "_takes_kernel", lambda values: False)
    torch.manual_seed(0)
    parts, expected = [], torch.zeros(3, dtype=torch.float64)
    for i, (dtype, shape) in enumerate((d, s) for d in TYPES for s in ((1,), (255, 3), (0,), (2**20 + 1,))):
        part = Part(torch.randn(shape).to(dtype), unit=i % 3, share=1.0 if i % 2 else 0.5)
        parts.append(part)
        expected[part.unit] += part.share * part.values.double().square().sum()
    sums = UnitSquares(3, "cpu")
    for _ in range(2):
        assert sums.of(parts) == pytest.approx(expected, rel=5e-6)
    assert sums.of(parts[:1]) == pytest.approx([0.5 * parts[0].values.double().square().item(), 0, 0], rel=1e-6)
    assert sums.of([]).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.3}),
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.Adam, {"weight_decay": 0.3}),  # whose decay is in the moments
        (torch.optim.Adam, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
    ],
)
def test_an_update_is_what_the_optimizer_did(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300_001, dtype=torch.float64))  # more than is worked on at a time
    optimizer = kind([weight], lr=1e-2, eps=1e-4, **options)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        before = weight.detach().clone()
        optimizer.step()
        state = optimizer.state[weight]
        step = adam_step(optimizer, optimizer.param_groups[0], state)
        assert step is not None
        square = update_square(weight, state["exp_avg"], state["exp_avg_sq"], step)
        assert square.item() == pytest.approx((weight - before).square().sum().item(), rel=1e-5)


class OwnStep(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {}), (torch.optim.NAdam, {}), (OwnStep, {}), (torch.optim.AdamW, {"amsgrad": True})],
)
def test_another_optimizer_s_update_is_not_guessed(kind: Any, options: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=1e-2, **options)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert adam_step(optimizer, optimizer.param_groups[0], optimizer.state[weight]) is None


class FusedAdam(torch.optim.SGD):
    """Stands in for DeepSpeed's or apex's, which are known by name."""

    adam_w_mode = True


def both(decoupled: bool) -> Any:
    """An Adam whose first group decays, and whose second does not."""

    def make(parameters: list[torch.nn.Parameter], lr: float) -> Any:
        first = {"params": parameters, "weight_decay": 0.1, "decoupled_weight_decay": decoupled}
        return torch.optim.Adam([first, {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0}], lr=lr)

    return make


@pytest.mark.parametrize(
    ("make", "adam", "reason"),
    [
        (torch.optim.AdamW, True, None),
        (lambda *args, **more: torch.optim.AdamW(*args, maximize=True, **more), True, "is set to amsgrad or maximize"),
        (torch.optim.Adam, True, None),  # without decay it is the same
        (
            lambda *args, **more: torch.optim.Adam(*args, weight_decay=0.1, **more),
            True,
            "adds its weight decay to the gradient",
        ),
        (both(decoupled=True), True, None),
        (both(decoupled=False), True, "adds its weight decay to the gradient"),
        (FusedAdam, True, None),
        (MaskedAdamW, True, None),
        (OwnStep, False, "has a step of its own"),
        (torch.optim.NAdam, False, "is not AdamW"),
        (torch.optim.SGD, False, "is not AdamW"),
    ],
)
def test_whether_it_is_adam_is_told_to_all_who_ask(make: Any, adam: bool, reason: str | None) -> None:
    """An update is replaced by AdamW's if it is that; its norm is worked out of the moments if it is Adam's at all."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight], lr=1e-2)
    assert (is_adam(optimizer), not_adamw(optimizer)) == (adam, reason)
    moments = {"step": 1, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    groups = [{"betas": (0.9, 0.999), "eps": 1e-8, **group} for group in optimizer.param_groups]
    assert (adam_step(optimizer, groups[0], moments) is None) == (not adam)
