"""What only a GPU can show: numerics of the compiled kernels, speed, CUDA graphs, NCCL ranks, bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_ds.errors import EngineError
from lisa_ds.ops import Backend, Hyper, SegmentTable, masked_adamw_, sum_of_squares, unavailable
from lisa_ds.optim import MaskedAdamW
from tests.gpu import gpu_runs
from tests.gpu.gpu_cases import BACKENDS, backend, copies, each_mode, on_gpu, state_of
from tests.ops.adamw_cases import MODES, Mode, clone, make_segment, make_segments, table_of
from tests.ranks import run_ranks
from tests.zero3.trajectory import Case

__all__ = ["backend"]

pytestmark = pytest.mark.gpu

# ---- numerics ----------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_step_is_the_specifications(backend: Backend, mode: Mode, offset: int) -> None:
    gpu_runs.follow_reference(backend, mode, offset)


@each_mode
def test_backends_agree_on_what_they_round_at_random(mode: Mode) -> None:
    """Bit for bit but for results that differ in their last place before they are rounded."""
    if any(unavailable(name) is not None for name in BACKENDS):
        pytest.skip("not both kernels can be used here")
    made = on_gpu(mode)
    sides = made, copies(made)
    for side, name in zip(sides, BACKENDS, strict=True):
        masked_adamw_(table_of(side), backend=name)
    for a, b in zip(*sides, strict=True):
        gpu_runs.check_equal(a, clone(b, "cpu"))


@each_mode
def test_an_overflow_changes_nothing(backend: Backend, mode: Mode) -> None:
    made = on_gpu(mode)
    before = copies(made)
    masked_adamw_(table_of(made), found_inf=torch.ones((), device="cuda"), backend=backend)
    assert all(map(torch.equal, state_of(made), state_of(before)))
    assert all(float(a.step) == float(b.step) for a, b in zip(made, before, strict=True))


@each_mode
def test_what_is_not_finite_goes_where_the_specification_says(backend: Backend, mode: Mode) -> None:
    made, theirs = on_gpu(mode), make_segments(mode)
    before = copies(made)
    for segment in (made[-1], theirs[-1]):
        segment.grad[[3, 300, -1]] = torch.tensor(
            [float("nan"), float("inf"), -float("inf")], dtype=segment.grad.dtype, device=segment.grad.device
        )
    assert not sum_of_squares(table_of(made), backend=backend).isfinite()
    # All but the first, which is frozen: nothing of it may change.
    masked_adamw_(table_of(made[1:]), backend=backend)
    masked_adamw_(table_of(theirs[1:]), backend="reference")
    assert all(map(torch.equal, state_of(made[:1]), state_of(before[:1])))
    for a, b in zip(made, theirs, strict=True):
        assert a.weight is not None
        assert b.weight is not None
        assert torch.equal(a.weight.isfinite().cpu(), b.weight.isfinite())


@each_mode
def test_offsets_beyond_two_billion(backend: Backend, mode: Mode) -> None:
    assert gpu_runs.far_away(backend, mode)


@pytest.mark.parametrize("offset", [0, 1])
@each_mode
def test_the_norm_is_exact_and_repeatable(backend: Backend, mode: Mode, offset: int) -> None:
    made = on_gpu(mode, offset=offset)
    first, again = (sum_of_squares(table_of(made), backend=backend) for _ in range(2))
    exact = sum(float(segment.grad.double().square().sum()) for segment in made)
    assert torch.equal(first, again)
    assert float(first) == pytest.approx(exact, rel=1e-6)


def test_a_table_of_nothing_launches_nothing(backend: Backend) -> None:
    table = table_of(on_gpu(MODES[0], sizes=(0,)))
    masked_adamw_(table, backend=backend)
    assert float(sum_of_squares(table, backend=backend)) == 0.0


# ---- no waiting, and graphs --------------------------------------------------------------------------------------


@each_mode
def test_the_host_waits_for_nothing(backend: Backend, mode: Mode) -> None:
    made = on_gpu(mode)
    table = table_of(made)
    factor, found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    rate = torch.tensor(1e-3, device="cuda")
    sum_of_squares(table, backend=backend)
    masked_adamw_(table, factor=factor, found_inf=found_inf, backend=backend)  # compiled and loaded: that may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        squares = sum_of_squares(table, backend=backend)
        masked_adamw_(table, factor=factor, found_inf=(~squares.isfinite()).float(), backend=backend)
        table.set_hypers([Hyper(lr=2e-3) for _ in made])
        table.set_hypers([Hyper(lr=rate) for _ in made])
        masked_adamw_(table, factor=factor, found_inf=found_inf, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_mode
def test_a_captured_step_replays_as_eager_ones(backend: Backend, mode: Mode) -> None:
    made = on_gpu(mode)
    eager, warm = copies(made), copies(made)
    factor, found_inf = torch.full((), 0.5, device="cuda"), torch.zeros((), device="cuda")
    masked_adamw_(table_of(warm), factor=factor, found_inf=found_inf, backend=backend)
    table, graph = table_of(made), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        masked_adamw_(table, factor=factor, found_inf=found_inf, backend=backend)
    eager_table = table_of(eager)
    for _ in range(5):
        graph.replay()
        masked_adamw_(eager_table, factor=factor, found_inf=found_inf, backend=backend)
    assert all(map(torch.equal, state_of(made), state_of(eager)))
    steps = [float(segment.step) for segment in made]
    assert steps == [float(segment.step) for segment in eager]
    assert steps[0] == 5  # it began at 0
    before = copies(made)
    found_inf.fill_(1.0)
    graph.replay()
    assert all(map(torch.equal, state_of(made), state_of(before)))
    assert [float(segment.step) for segment in made] == steps
    found_inf.fill_(0.0)
    graph.replay()
    assert [float(segment.step) for segment in made] == [step + 1 for step in steps]


@pytest.mark.parametrize("name", ["fp32", "none_fp32"])
def test_a_captured_step_reads_its_rate_on_the_device(backend: Backend, name: str) -> None:
    mode = next(mode for mode in MODES if mode.name == name)
    segment = make_segment(mode, 5000, device="cuda")
    rate = torch.tensor(1e-2, device="cuda")
    table = SegmentTable([segment], [Hyper(lr=rate)])
    masked_adamw_(table, backend=backend)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        masked_adamw_(table, backend=backend)
    assert segment.weight is not None
    before = segment.weight.clone()
    graph.replay()
    assert not torch.equal(segment.weight, before)
    rate.fill_(0.0)
    table.set_hypers(table.hypers)
    before = segment.weight.clone()
    graph.replay()
    assert torch.equal(segment.weight, before)


@pytest.mark.parametrize(
    "change", [{"lr": 3e-2}, {"lr_scale": 0.5}, {"weight_decay": 0.2}, {"betas": (0.5, 0.7)}, {"eps": 1.0}], ids=str
)
def test_a_captured_step_follows_numbers_that_are_set_later(backend: Backend, change: dict[str, Any]) -> None:
    made = [make_segment(MODES[0], size, device="cuda") for size in (5000, 300)]
    eager = copies(made)
    first, later = Hyper(lr=1e-2, weight_decay=0.1), Hyper(**{"lr": 1e-2, "weight_decay": 0.1, **change})
    table, eager_table = SegmentTable(made, [first] * 2), SegmentTable(eager, [first] * 2)
    for each in (table, eager_table):
        masked_adamw_(each, backend=backend)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        masked_adamw_(table, backend=backend)
    for hyper in (first, later, first):
        table.set_hypers([hyper] * 2)
        eager_table.set_hypers([hyper] * 2)
        torch.full((1000,), -1.0, device="cuda")  # would take the place of a table that is gone
        graph.replay()
        masked_adamw_(eager_table, backend=backend)
        assert all(map(torch.equal, state_of(made), state_of(eager)))


def test_numbers_cannot_change_inside_of_a_capture(backend: Backend) -> None:
    table = SegmentTable([make_segment(MODES[0], 500, device="cuda")], [Hyper()])
    masked_adamw_(table, backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        masked_adamw_(table, backend=backend)
        with pytest.raises(EngineError, match="every replay would set them"):
            table.set_hypers([Hyper(lr=1.0)])
        with pytest.raises(EngineError, match="take one step with the same tensors"):
            SegmentTable(table.segments, [Hyper()])


def small_net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3)).cuda()


@pytest.mark.parametrize("whole", [False, True], ids=["step_alone", "whole_iteration"])
def test_a_captured_optimizer_follows_its_schedule(backend: Backend, whole: bool) -> None:
    """Eager steps in between, with gradients elsewhere, change nothing about what is replayed."""
    nets, rows = [small_net(), small_net()], torch.randn(8, 40, device="cuda")
    optimizers = [
        MaskedAdamW(net.parameters(), lr=torch.tensor(1e-2, device="cuda"), max_grad_norm=1.0, backend=backend)
        for net in nets
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.5**step) for each in optimizers]

    def backward(net: torch.nn.Module) -> None:
        net(rows).square().mean().backward()

    def iterate(i: int, *, to_none: bool) -> None:
        optimizers[i].zero_grad(set_to_none=to_none)
        backward(nets[i])
        optimizers[i].step()

    for _ in range(2):
        for i in (0, 1):
            iterate(i, to_none=False)
    graph = torch.cuda.CUDAGraph()
    if whole:
        optimizers[0].zero_grad(set_to_none=True)
    else:
        optimizers[0].zero_grad(set_to_none=False)
        backward(nets[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        if whole:
            backward(nets[0])
        optimizers[0].step()
    static = [parameter.grad for parameter in nets[0].parameters()]
    for step in range(6):
        schedules[0].step()
        schedules[1].step()
        if step == 3:  # out of the graph, with other gradients
            iterate(0, to_none=True)
            for parameter, gradient in zip(nets[0].parameters(), static, strict=True):
                parameter.grad = gradient
        else:
            if not whole:
                optimizers[0].zero_grad(set_to_none=False)
                backward(nets[0])
            graph.replay()
        iterate(1, to_none=True)
        for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_rate_that_is_a_number_is_not_captured(backend: Backend) -> None:
    net = small_net()
    optimizer = MaskedAdamW(net.parameters(), lr=1e-2, backend=backend)
    net(torch.randn(8, 40, device="cuda")).square().mean().backward()
    optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda")  # a graph of nothing is warned about
        with pytest.raises(EngineError) as caught:
            optimizer.step()
    assert str(caught.value) == (
        "param_groups[0]['lr'] is the number 0.01, which a captured step would repeat whatever it is set to later; give it as a "
        "tensor, which replays read: lr=torch.tensor(0.01, device='cuda:0')"
    )
    optimizer = MaskedAdamW(net.parameters(), lr=torch.tensor(1e-2, device="cuda"), backend=backend)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda")
        with pytest.raises(EngineError, match="first step of these parameters"):
            optimizer.step()
    assert not optimizer.state


# ---- speed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sixteen_bit", [True, False], ids=["mixed", "fp32"])
def test_a_step_keeps_pace_with_a_copy_of_its_traffic(backend: Backend, sixteen_bit: bool) -> None:
    numel = 2**26
    if torch.cuda.mem_get_info()[0] < 64 * numel:
        pytest.skip(f"needs {64 * numel / 2**30:.0f} GiB of free GPU memory")
    times = gpu_runs.roofline(backend, numel, sixteen_bit=sixteen_bit)
    assert times["copy"] / times["step"] >= 0.85, times


# ---- NCCL ranks --------------------------------------------------------------------------------------------------


def run_on_gpus(world_size: int, tmp_path: Path, body: Any, *args: Any) -> list[Any]:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices, there is {torch.cuda.device_count()}")
    return run_ranks(world_size, gpu_runs.on_gpus, tmp_path, body, *args, timeout_s=400, gpus=True)


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "case",
    [Case("plain"), Case("accumulation", accumulation=2), Case("small_buckets", small_buckets=True)],
    ids=lambda case: case.name,
)
def test_trajectory_with_overlapping_communication(tmp_path: Path, world_size: int, case: Case) -> None:
    from tests.zero3 import test_trajectory

    first, *others = run_on_gpus(world_size, tmp_path, gpu_runs.run_trajectory, case)
    theirs = test_trajectory.reference(case, world_size)
    assert first.layers == theirs.layers
    assert all(other.layers == first.layers for other in others)
    found = test_trajectory.differences(first, theirs)
    assert all(found[key] <= bound for key, bound in test_trajectory.BOUNDS.items()), found


# ---- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_the_formulas_and_stay_flat_over_switches(tmp_path: Path, world_size: int, dtype: str) -> None:
    case = Case("bytes", dtype=dtype, interval_steps=2, width=4)
    for seen in run_on_gpus(world_size, tmp_path, gpu_runs.run_switches, case, 20):
        assert len({step["layers"] for step in seen}) > 5
        for step in seen:
            assert step["report"] == step["planned"], step["layers"]
        allocated = [step["allocated"] for step in seen[3:]]
        # The moments of one block alone are five times this.
        assert max(allocated) - min(allocated) <= 2**16, allocated
