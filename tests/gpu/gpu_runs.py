"""What the tests of tests/gpu run on a GPU: beside them, on NCCL ranks, or under compute-sanitizer (``python -m tests.gpu.gpu_runs``)."""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from lisa_ds.ops import Backend, Hyper, Segment, SegmentTable, masked_adamw_, segments
from tests.ops import address_runs
from tests.ops.adamw_cases import MODES, Mode, make_segment, make_segments, new_gradients, table_of, ulps
from tests.zero3 import trajectory
from tests.zero3.trajectory import MICRO_BATCH, Case, Outcome

STATE = ("weight", "master", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "step")

# ---- against the specification -----------------------------------------------------------------------------------


def follow_reference(backend: Backend, mode: Mode, offset: int, steps: int = 5) -> None:
    """Steps on the GPU and, from the same state each time, of the reference on the CPU."""
    ours: list[Segment] = make_segments(mode, offset=offset, device="cuda")
    theirs = make_segments(mode, offset=offset)
    tables = table_of(ours), table_of(theirs)
    for step in range(steps):
        new_gradients(ours, theirs, step)
        masked_adamw_(tables[0], factor=torch.tensor(0.5, device="cuda"), backend=backend)
        masked_adamw_(tables[1], factor=torch.tensor(0.5), backend="reference")
        for a, b in zip(ours, theirs, strict=True):
            check_equal(a, b)
            for name in STATE:
                if getattr(a, name) is not None:
                    getattr(a, name).copy_(getattr(b, name))


def check_equal(ours: Segment, theirs: Segment) -> None:
    """After one step from one state: fp32 within some last places, what is rounded to fewer bits within one, and that seldom."""
    for name in STATE:
        a, b = getattr(ours, name), getattr(theirs, name)
        if b is None or not b.numel():
            continue
        a = a.cpu()
        least = 1e-13 if "sq" in name else 1e-8  # where a sum comes out near zero, its terms' last places show
        if b.dtype == torch.float32:
            apart = (a - b).abs() > 5e-7 * b.abs() + least
            assert not apart.any(), f"{name} of {b.numel()}: {a[apart][:5]} and {b[apart][:5]}"
        else:
            apart = ulps(a, b)
            if b.is_floating_point():
                apart = apart.masked_fill((a.float() - b.float()).abs() <= least, 0)
            assert int(apart.max()) <= 1, f"{name} of {b.numel()}: {a[apart > 1][:5]} and {b[apart > 1][:5]}"
            assert int((apart > 0).sum()) <= 2 + 5e-3 * b.numel(), f"{name} of {b.numel()}"


def far_away(backend: Backend, mode: Mode) -> bool:
    """Whether a block that begins 2**31 + 4096 elements behind its segment's first takes the step of one that begins there."""
    start = 2**31 + 4096
    near, far, before = (make_segment(mode, 300, step=3, device="cuda") for _ in range(3))
    table = SegmentTable([far], [Hyper(lr=0.1)])
    rows = table.addresses.cpu()
    for column, tensor in zip(range(segments.STEP), far.tensors, strict=False):
        if tensor is not None:
            of_blocks = column in (segments.EXP_AVG_SCALE, segments.EXP_AVG_SQ_SCALE)
            rows[0, column] -= start // (segments.QUANT_BLOCK if of_blocks else 1) * tensor.element_size()
    rows[0, segments.NUMEL], rows[0, segments.FIRST_BLOCK] = start + 300, -(start // segments.BLOCK)
    table.addresses.copy_(rows)
    masked_adamw_(SegmentTable([near], [Hyper(lr=0.1)]), backend=backend)
    masked_adamw_(table, backend=backend)
    return address_runs.moved(before, far) > 290 and address_runs.same_step(near, far)


# ---- time --------------------------------------------------------------------------------------------------------


def roofline(backend: Backend, numel: int, *, sixteen_bit: bool) -> dict[str, float]:
    """Median milliseconds of a step of ``numel`` elements, and of a copy that moves the same 28 bytes for each."""
    mode = Mode("timed") if sixteen_bit else Mode("timed", weight=torch.float32, grad=torch.float32, master=False)
    parts = 8
    made = [make_segment(mode, numel // parts, stream=i, step=10, device="cuda") for i in range(parts)]
    table = SegmentTable(made, [Hyper(lr=1e-8, weight_decay=0.1)] * parts)
    source = torch.zeros(14 * numel, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bodies: dict[str, Callable[[], object]] = {
        "step": lambda: masked_adamw_(table, backend=backend),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for turn in range(40):  # interleaved, so that clocks and neighbours weigh on both alike
        for name, body in bodies.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            body()
            end.record()
            torch.cuda.synchronize()
            if turn >= 10:
                times[name].append(begin.elapsed_time(end))
    return {name: float(torch.tensor(samples).median()) for name, samples in times.items()}


# ---- NCCL ranks --------------------------------------------------------------------------------------------------


def on_gpus(body: Callable[..., Any], *args: Any) -> Any:
    """Turns a rank of ``run_ranks(..., gpus=True)`` into an NCCL rank, and calls ``body(*args)`` there."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=world_size, device_id=device)
    return body(*args)


def _build_engine(case: Case) -> Any:
    from tests.zero3 import engine_runs

    plain = trajectory.deepspeed_config

    def overlapped(case: Case, world_size: int) -> dict[str, Any]:
        config = plain(case, world_size)
        config["zero_optimization"]["overlap_comm"] = True
        return config

    with mock.patch.object(trajectory, "deepspeed_config", overlapped):
        return engine_runs.build_engine(case)


def run_trajectory(case: Case) -> Outcome:
    """One run of ``case`` with ``overlap_comm``; losses are means over ranks."""
    from tests.zero3 import engine_runs

    engine = _build_engine(case)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses, norms, layers = [], [], []
    for step, micro in enumerate(trajectory.micro_batches(case, world_size)):
        layers.append(engine.sampled_layers)
        total = torch.zeros((), device=engine.device)
        for batch in micro:
            rows = batch[rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH].to(engine.device)
            loss = engine(input_ids=rows, labels=rows).loss
            total += loss.detach() / case.accumulation
            engine.backward(loss * float("inf") if case.overflow_at == step else loss)
            engine.step()
        dist.all_reduce(total)
        losses.append(float(total) / world_size)
        norms.append(float(engine.get_global_grad_norm()))
    parameters = {name: value.cpu() for name, value in engine_runs.full_parameters(engine).items()}
    engine.destroy()
    return Outcome(losses, norms, parameters, layers)


def run_switches(case: Case, switches: int) -> list[dict[str, Any]]:
    """Bytes after the first step of each interval: as reported, as planned, and as torch's allocator counts them."""
    from lisa_ds.memory import Precision, state_bytes

    assert case.interval_steps == 2
    engine = _build_engine(case)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = next(trajectory.micro_batches(case, world_size))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    rows = rows.to(engine.device)
    element = {"fp32": 4, "bf16": 2}[case.dtype]
    seen = []
    gc.freeze()  # what was made until now is not looked through again at each collection
    for step in range(2 * switches + 1):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
        if step % 2:  # this step has switched
            continue
        gc.collect()
        torch.cuda.synchronize()
        report = engine.memory_report()
        planned = state_bytes(
            engine.model_shape,
            sampled=engine.sampled_layers,
            world_size=world_size,
            precision=Precision(element, element, bucket_bytes=report["buckets"]),
        )
        allocated = torch.cuda.memory_allocated()
        seen.append({"layers": engine.sampled_layers, "report": report, "planned": planned, "allocated": allocated})
    engine.destroy()
    return seen


# ---- under compute-sanitizer -------------------------------------------------------------------------------------


def main() -> None:
    """A small step of every mode, and its norm, with every tensor in an allocation of its own.

    Usage: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m tests.gpu.gpu_runs triton|cuda [FILE]
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("backend", choices=("triton", "cuda"))
    parser.add_argument(
        "file", nargs="?", type=Path, help="in place of the backend's module (triton) or library (cuda)"
    )
    parser.add_argument("--modes", nargs="+", choices=[mode.name for mode in MODES], help="these alone")
    arguments = parser.parse_args()
    room = room_from(arguments.backend, arguments.file)
    for mode in [mode for mode in MODES if arguments.modes is None or mode.name in arguments.modes]:
        for offset in (0, 1):
            sizes = (1, 7, 300, 2048, 2049, 4096 + 513)
            made: list[Segment] = make_segments(mode, sizes, offset=offset, device="cuda")
            table = table_of(made)
            for step in table.steps:
                step += 1
            room.sum_of_squares(table)
            room.masked_adamw_(table, table.one, table.zero)
            torch.cuda.synchronize()
    print("all modes have run")


def room_from(backend: str, file: Path | None) -> ModuleType:
    """The backend's module, or one made of ``file``."""
    if file is None or backend == "cuda":
        room = importlib.import_module(f"lisa_ds.ops.{backend}")
        if file is not None:
            library = room.declared(str(file))
            room.load = lambda: library  # type: ignore[attr-defined]
        return room
    spec = importlib.util.spec_from_file_location("triton_from_file", file)
    assert spec is not None
    assert spec.loader is not None
    room = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(room)
    return room


if __name__ == "__main__":
    main()
