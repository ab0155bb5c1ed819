"""Tables of segments: what launches read of them, what they refuse, and how much memory an element takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lisa_ds.errors import EngineError
from lisa_ds.ops import Hyper, SegmentTable, masked_adamw_, unavailable
from lisa_ds.ops.segments import layout_of, write_by_launches
from tests.ops.adamw_cases import MODES, Mode, clone, make_segment, make_segments, table_of

BY_NAME = {mode.name: mode for mode in MODES}


@pytest.mark.parametrize("name", ["fp32", "none_fp32"])
def test_a_rate_in_a_tensor_is_read_where_it_is(name: str) -> None:
    rate = torch.tensor(0.1)
    segment = make_segment(BY_NAME[name], 10)
    assert segment.weight is not None
    segment.grad.fill_(1.0)
    before = segment.weight.clone()
    table = SegmentTable([segment], [Hyper(lr=rate, lr_scale=0.5, eps=0.0)])
    masked_adamw_(table)
    assert torch.allclose(before - segment.weight, torch.tensor(0.05))
    rate.fill_(0.0)
    table.set_hypers([Hyper(lr=rate, lr_scale=0.5, eps=0.0)])
    before = segment.weight.clone()
    masked_adamw_(table)
    assert torch.equal(before, segment.weight)


@pytest.mark.parametrize(
    "change", [{"lr": 0.3}, {"lr_scale": 0.5}, {"weight_decay": 0.2}, {"betas": (0.5, 0.7)}, {"eps": 1.0}], ids=str
)
def test_what_a_captured_launch_reads_is_rewritten_where_it_lies(change: dict[str, Any]) -> None:
    segments = make_segments(MODES[0], (10, 300))
    first, other = Hyper(lr=0.1, weight_decay=0.1), Hyper(**{"lr": 0.1, "weight_decay": 0.1, **change})
    table = SegmentTable(segments, [first, first])
    hyper, addresses = table.hyper, table.addresses  # all that a graph knows
    table.set_hypers([first, other])
    expected = SegmentTable(segments, [first, other])
    assert torch.equal(hyper, expected.hyper)
    moved = [clone(segment) for segment in segments]
    table.point_at(moved)
    assert torch.equal(addresses, SegmentTable(moved, [first, other]).addresses)
    assert table.hyper is hyper
    assert table.addresses is addresses


def test_addresses_written_by_launches_are_those_that_were_meant() -> None:
    segments = make_segments(MODES[3], (10, 300))
    here, there = table_of(segments), table_of([clone(segment) for segment in segments])
    write_by_launches(here.addresses, there.addresses.tolist(), here.addresses.tolist())
    assert torch.equal(here.addresses, there.addresses)
    assert here.addresses.abs().max() > 2**40  # beyond what a float could hold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(9)}, "all segments of a launch share their types"),
        ({"exp_avg": torch.zeros(9)}, "segment 1: exp_avg has 9 elements, should have 10"),
        ({"grad": torch.zeros(20, dtype=torch.bfloat16)[::2]}, "segment 1: grad is not contiguous"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, "segment 1: step should be torch.float32, got torch.int64"),
        ({"exp_avg": torch.zeros(10, dtype=torch.int8)}, "all segments of a launch share their types"),
        (
            {"exp_avg": None},
            "segment 1: exp_avg_sq is given and exp_avg is None; give both moments, or neither for no moments",
        ),
        (
            {"exp_avg_sq": None},
            "segment 1: exp_avg is given and exp_avg_sq is None; give both moments, or neither for no moments",
        ),
        ({"exp_avg": None, "exp_avg_sq": None}, "all segments of a launch share their types"),
    ],
)
def test_a_table_refuses_what_does_not_go_together(change: dict[str, torch.Tensor | None], message: str) -> None:
    from dataclasses import replace

    mode = next(mode for mode in MODES if mode.name == "mixed")
    good = make_segment(mode, 10)
    with pytest.raises(ValueError, match=message):
        SegmentTable([good, replace(good, **change)], [Hyper(), Hyper()])


@pytest.mark.parametrize("change", [{"exp_avg": torch.zeros(10)}, {"exp_avg_scale": torch.zeros(1)}], ids=str)
def test_a_table_without_moments_refuses_parts_of_them(change: dict[str, torch.Tensor]) -> None:
    from dataclasses import replace

    good = make_segment(BY_NAME["none_master"], 10)
    with pytest.raises(ValueError, match=r"segment 0: (exp_avg is given and exp_avg_sq is None|scales go with int8)"):
        SegmentTable([replace(good, **change)], [Hyper()])
    table = SegmentTable([good], [Hyper()])
    with pytest.raises(ValueError, match=r"exp_avg is given and exp_avg_sq is None|of the same types and sizes"):
        table.point_at([replace(good, exp_avg=torch.zeros(10))])


def test_layouts_that_no_kernel_has_are_refused() -> None:
    from dataclasses import replace

    half = make_segment(Mode("half", weight=torch.float16, grad=torch.float16), 4)
    with pytest.raises(ValueError, match="without a master copy weights are bfloat16 or float32"):
        layout_of(replace(half, master=None))
    with pytest.raises(ValueError, match="bfloat16 moments go with stochastic rounding"):
        layout_of(replace(half, exp_avg=torch.zeros(4, dtype=torch.bfloat16)))


def test_bytes_per_element_are_those_of_the_modes() -> None:
    expected = {"fp32": 28, "mixed": 28, "mixed_fp32_grad": 30, "sr_fp32_moments": 22, "sr_16bit": 14}
    expected |= {"int8_master": 16, "int8_sr": 10}
    expected |= {"none_master": 12, "none_fp32": 12, "none_sr": 6, "none_sr_fp32_grad": 8}
    found = {name: layout_of(make_segment(BY_NAME[name], 256)).bytes_per_element for name in expected}
    assert found == expected


def test_a_backend_that_cannot_be_used_says_why() -> None:
    table = table_of(make_segments(MODES[0], (8,)))
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for backend in ("triton", "cuda"):
        assert unavailable(backend) is not None
        with pytest.raises(EngineError, match=f"backend '{backend}' cannot be used here"):
            masked_adamw_(table, backend=backend)
    with pytest.raises(EngineError, match="should be one of reference, cpu, triton, cuda, got 'tritn'"):
        masked_adamw_(table, backend="tritn")  # type: ignore[arg-type]
