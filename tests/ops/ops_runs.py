"""What one backend does with every mode, returned as plain numbers; runs in a process of its own (tests/ops/test_ops.py)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lisa_ds.ops import Backend, Hyper, Segment, SegmentTable, masked_adamw_, sum_of_squares
from lisa_ds.ops import reference as specification
from tests.ops import adamw_cases, triton_mutants
from tests.ops.adamw_cases import MODES, Mode, clone, make_segment, make_segments, table_of, ulps

SEED = 5
FIELDS = ("weight", "master", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "step")


def run(backend: Backend, names: Collection[str] = tuple(mode.name for mode in MODES)) -> dict[str, Any]:
    """All measurements of one backend in these modes."""
    torch.set_num_threads(2)
    return {
        mode.name: {
            "accuracy": accuracy(backend, mode),
            "one_step": one_step(backend, mode),
            "reference": against_reference(backend, mode),
            "frozen": frozen(backend, mode),
            "overflow": overflow(backend, mode),
            "not_finite": not_finite(backend, mode),
            "zero_over_zero": zero_over_zero(backend, mode),
            "sum_of_squares": squares(backend, mode),
        }
        for mode in MODES
        if mode.name in names
    }


# ---- against fp64 and torch --------------------------------------------------------------------------------------


def accuracy(backend: Backend, mode: Mode) -> dict[str, float]:
    """Largest distance from fp64 AdamW after 20 steps: of ours, and of torch's in fp32. Modes with fp32 state only.

    Without moments torch's optimizers forget theirs before each step.
    """
    if mode.moments not in (None, torch.float32) or not (mode.master or mode.weight == torch.float32):
        return {}
    segments = [replace(s, step=torch.zeros(())) for s in make_segments(mode, (4096 + 513, 2048, 7))]
    settings = adamw_cases.hypers(len(segments))
    start = [source(segment).clone() for segment in segments]
    exact, single = ([value.to(dtype) for value in start] for dtype in (torch.float64, torch.float32))
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [value], "lr": float(h.lr) * h.lr_scale, "weight_decay": h.weight_decay, "eps": h.eps}
                for value, h in zip(values, settings, strict=True)
            ],
            foreach=False,
        )
        for values in (exact, single)
    ]
    table = table_of(segments)
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        for i, segment in enumerate(segments):
            segment.grad.copy_(0.1 * torch.randn(segment.numel, generator=draw))
            exact[i].grad, single[i].grad = segment.grad.double(), segment.grad.float()
        for optimizer in optimizers:
            if mode.moments is None:
                optimizer.state.clear()
            optimizer.step()
        masked_adamw_(table, backend=backend)

    def distance(values: list[Tensor]) -> float:
        return max(float((a.double() - b).abs().max()) for a, b in zip(values, exact, strict=True))

    moments = {
        key: [optimizer.state[p][key] for p in values]
        for optimizer, values in zip(optimizers, (exact, single), strict=True)
        for key in (("exp_avg", "exp_avg_sq") if mode.moments is not None else ())
        if optimizer is optimizers[0]
    }
    return {
        "ours": distance([source(segment) for segment in segments]),
        "torch": distance(single),
        **{
            f"ours {key}": max(
                float((getattr(s, key).double() - m).abs().max()) for s, m in zip(segments, values, strict=True)
            )
            for key, values in moments.items()
        },
        **{
            f"torch {key}": max(
                float((optimizers[1].state[p][key].double() - m).abs().max())
                for p, m in zip(single, values, strict=True)
            )
            for key, values in moments.items()
        },
        "steps": float(segments[0].step),
        "written_back": written_back(mode, segments),
    }


def source(segment: Segment) -> Tensor:
    found = segment.weight if segment.master is None else segment.master
    assert found is not None
    return found


def written_back(mode: Mode, segments: list[Segment]) -> float:
    """Weights that are not their master copy, rounded as torch rounds."""
    if not mode.master:
        return 0.0
    return float(sum((s.master.to(s.weight.dtype) != s.weight).sum() for s in segments))  # type: ignore[union-attr]


def one_step(backend: Backend, mode: Mode) -> dict[str, float]:
    """One step from the same random state, in fp64, in torch's fp32, and in ours before it is rounded into 8 or 16 bits.

    Without moments torch's is the first one of an optimizer.
    """
    segment = make_segment(mode, 4096 + 513, step=7)
    if mode.moments is not None:
        first, second = (moment.clone() for moment in specification._moments(with_history(segment)))
    eps = 0.05 if mode.moments is None else 1e-8  # beside the gradient itself, a small one would not be seen
    segment.grad[::50] = 0.0
    hyper = Hyper(lr=2e-3, weight_decay=0.1, eps=eps)
    before = source(segment).clone()
    results = []
    for dtype in (torch.float64, torch.float32):
        value = before.to(dtype)
        value.grad = segment.grad.to(dtype)
        optimizer = torch.optim.AdamW([value], lr=2e-3, weight_decay=0.1, eps=eps, foreach=False)
        if mode.moments is not None:
            optimizer.state[value] = {
                "step": torch.tensor(7.0),
                "exp_avg": first.to(dtype),
                "exp_avg_sq": second.to(dtype),
            }
        optimizer.step()
        results.append((value, optimizer.state[value]["exp_avg"], optimizer.state[value]["exp_avg_sq"]))
    (exact, exact_first, exact_second), (single, _, _) = results
    masked_adamw_(SegmentTable([segment], [hyper], seed=SEED), backend=backend)
    updated = source(segment).double()
    result = {
        "ours": float((updated - exact).abs().max()),
        "torch": float((single.double() - exact).abs().max()),
        # Stochastic rounding must leave one of the two neighbours: less than a last place from the exact value.
        "last_places": float(((updated - exact).abs() / last_place(exact)).max()),
    }
    if mode.moments is None:
        return result
    now_first, now_second = specification._moments(segment)
    for key, now, right in (("exp_avg", now_first, exact_first), ("exp_avg_sq", now_second, exact_second)):
        share = (now.double() - right).abs() / right.abs().amax()
        result[key] = float(share.max())
    return result


def last_place(value: Tensor) -> Tensor:
    """Of bfloat16 at ``value``."""
    return torch.exp2(torch.floor(torch.log2(value.abs().clamp(min=1e-30))) - 7)


def with_history(segment: Segment) -> Segment:
    """With moments as some steps leave them."""
    draw = torch.Generator().manual_seed(11)
    first = 0.03 * torch.randn(segment.numel, generator=draw)
    second = 1e-3 * torch.rand(segment.numel, generator=draw) + 1e-6
    specification._keep_moments(segment, first, second, torch.randint(0, 2**16, (segment.numel,), generator=draw))
    return segment


# ---- against the specification -----------------------------------------------------------------------------------


def against_reference(backend: Backend, mode: Mode) -> dict[str, Any]:
    """Three steps beside the reference: odd sizes, odd places, histories of their own, a factor, and an overflow amid them."""
    result: dict[str, Any] = {}
    for offset in (0, 3):
        ours = make_segments(mode, offset=offset)
        theirs = [clone(segment) for segment in ours]
        tables = table_of(ours, seed=SEED), table_of(theirs, seed=SEED)
        factor = torch.tensor(0.5)
        for step in range(3):
            adamw_cases.new_gradients(ours, theirs, step)
            for table, name in zip(tables, (backend, "reference"), strict=True):
                masked_adamw_(table, factor=factor, backend=name)  # type: ignore[arg-type]
            if step == 1:
                masked_adamw_(tables[0], factor=factor, found_inf=torch.ones(()), backend=backend)
        for key in FIELDS:
            pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(ours, theirs, strict=True)]
            pairs = [(a, b) for a, b in pairs if a is not None and a.numel()]
            if pairs:
                apart = torch.cat([ulps(a, b).reshape(-1) for a, b in pairs])
                distance = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
                before = result.get(key, (0, 0, 0.0))
                result[key] = (
                    max(before[0], int(apart.max())),
                    before[1] + float((apart > 1).double().mean()) / 2,
                    max(before[2], distance),
                )
    return result


def frozen(backend: Backend, mode: Mode) -> bool:
    """Segments that are not in the table keep every byte, whatever their gradients are; those that are change."""
    segments = make_segments(mode)
    for segment in segments[1::2]:
        segment.grad.fill_(float("nan"))
    before = [clone(segment) for segment in segments]
    masked_adamw_(table_of(segments[::2]), backend=backend)
    same = [equal_bytes(a, b) for a, b in zip(segments, before, strict=True)]
    # A few 16-bit weights may all be rounded back to what they were, where there is nothing else to change.
    unchanged = [kept for kept, segment in zip(same, segments, strict=True) if segment.numel > 100 and kept]
    return all(same[1::2]) and len(unchanged) == sum(segment.numel > 100 for segment in segments[1::2])


def overflow(backend: Backend, mode: Mode) -> bool:
    """With ``found_inf`` nothing changes at all, not even a step count."""
    segments = make_segments(mode)
    segments[2].grad.fill_(float("inf"))
    before = [clone(segment) for segment in segments]
    masked_adamw_(table_of(segments), found_inf=torch.ones(()), backend=backend)
    return all(equal_bytes(a, b) for a, b in zip(segments, before, strict=True))


def not_finite(backend: Backend, mode: Mode) -> dict[str, Any]:
    """A NaN and an infinity in the gradients: the sum of squares tells, and without 8-bit blocks only they are spoilt."""
    segment = make_segment(mode, 3000)
    result = {}
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        spoilt = clone(segment)
        spoilt.grad[[5, 2999]] = value
        table = SegmentTable([spoilt], [Hyper()])
        result[name] = bool(sum_of_squares(table, backend=backend).isfinite())
        masked_adamw_(table, backend=backend)
        assert spoilt.weight is not None
        result[f"{name} spoilt"] = (~spoilt.weight.isfinite()).nonzero().flatten().tolist()
    return result


def zero_over_zero(backend: Backend, mode: Mode) -> list[int]:
    """Which weights are NaN after a step with an eps of 0, in whole blocks and behind them, where two gradients are 0."""
    segment = make_segment(mode, 3000)
    segment.grad.fill_(0.1)
    segment.grad[[5, 2999]] = 0.0
    masked_adamw_(SegmentTable([segment], [Hyper(eps=0.0)]), backend=backend)
    assert segment.weight is not None
    return segment.weight.isnan().nonzero().flatten().tolist()


def squares(backend: Backend, mode: Mode) -> dict[str, float]:
    table = table_of(make_segments(mode, offset=3))
    first, again = (float(sum_of_squares(table, backend=backend)) for _ in range(2))
    exact = sum(float(s.grad.double().square().sum()) for s in table.segments)
    return {"ours": first, "again": again, "exact": exact}


def equal_bytes(first: Segment, second: Segment) -> bool:
    pairs = [(getattr(first, item.name), getattr(second, item.name)) for item in fields(Segment)]
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs if isinstance(a, Tensor) and a.dim()
    )


# ---- mutants of the Triton kernels, seen by the same comparison ----------------------------------------------------


def run_mutant(name: str) -> dict[str, bool]:
    """Whether a kernel with one mistake in it passes the checks of the right one, by mode."""
    triton_mutants.install(name)
    passes = {}
    tried = ("fp32", "mixed", "sr_fp32_moments", "sr_16bit", "int8_master")
    if name in triton_mutants.WITHOUT_MOMENTS:
        tried = ("none_master", "none_fp32", "none_sr")
    for mode in MODES:
        if mode.name not in tried:
            continue
        found = one_step("triton", mode)
        if mode.master or mode.weight == torch.float32:
            passes[mode.name] = found["ours"] <= 2 * found["torch"]
        elif mode.moments is None:
            passes[mode.name] = found["last_places"] < 1.001
        else:
            apart = against_reference("triton", mode)
            passes[mode.name] = apart["weight"][0] <= 1 and apart["exp_avg"][1] <= 1e-3
    return passes


def run_truncation() -> float:
    """Weights that are not their rounded masters, with the interpreter's own cast in place of ours."""
    triton_mutants.install("truncating cast")
    mode = next(mode for mode in MODES if mode.name == "mixed")
    segments = make_segments(mode, (2048,))
    masked_adamw_(table_of(segments), backend="triton")
    return written_back(mode, segments)
