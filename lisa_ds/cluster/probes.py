"""Speed tests: how fast a rank copies and multiplies, and how fast and whether rightly the ranks all-reduce."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from lisa_ds.cluster.findings import Finding

SIZES = {"gloo": (2**12, 2**20, 2**24), "nccl": (2**12, 2**20, 2**24, 2**28)}
"""Bytes of the fp32 tensors that are all-reduced."""

SLOW = 1.5
"""A rank that takes longer than this many times the median of all ranks holds up the others."""

_BUDGET_S = 1.0  # of one size
_MOST_REPEATS = 20
_REPEATS = 5
_COPY_BYTES = {"cpu": 2**25, "cuda": 2**29}
_MATMUL_SIDE = {"cpu": 512, "cuda": 8192}


def local(device: torch.device) -> dict[str, float]:
    """The fastest of several copies and matrix products on this rank, in seconds and as a rate.

    Returns:
        ``copy_s, matmul_s``; ``copy_gb_per_s`` counts bytes read and written, ``matmul_tflops`` is of bf16 on a GPU and
        fp32 on one core of a CPU.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    size, side = _COPY_BYTES[device.type], _MATMUL_SIDE[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.ones(side, side, device=device, dtype=dtype)
    copy_s = min(_times(lambda: target.copy_(source), device))
    matmul_s = min(_times(lambda: left @ left, device))
    return {
        "copy_s": copy_s,
        "matmul_s": matmul_s,
        "copy_gb_per_s": 2 * size / copy_s / 1e9,
        "matmul_tflops": 2 * side**3 / matmul_s / 1e12,
    }


def slow_ranks(hosts: Mapping[int, str], measured: Mapping[int, Mapping[str, float]]) -> list[Finding]:
    """Ranks that take much longer than the median of all, by :func:`local`."""
    findings = []
    for key, what in (("copy_s", "copying memory"), ("matmul_s", "multiplying matrices")):
        usual = statistics.median(one[key] for one in measured.values())
        for rank, one in measured.items():
            if one[key] > SLOW * usual:
                text = f"{what} takes {one[key] / usual:.1f} times as long as on the median rank"
                remedy = "every step waits for the slowest rank: see what else runs there, its clocks and its cooling"
                findings.append(Finding(f"{hosts[rank]} (rank {rank})", text, remedy, is_error=False))
    return findings


def all_reduce(
    store: Store, rank: int, world_size: int, device: torch.device, timeout: float
) -> list[dict[str, float]]:
    """All-reduce tensors of several sizes, compare with the exact sum, and take the time.

    The process group is made for this and destroyed again. A larger tensor is left out where it would take long.

    Returns:
        For each size: ``bytes, seconds`` (median; of the slowest rank), ``algorithm_gb_per_s`` (bytes / seconds) and
        ``bus_gb_per_s`` (times 2 (n - 1) / n, which does not depend on the number of ranks), and ``wrong``, elements
        that are not the sum.

    Raises:
        RuntimeError: The backend's, if ranks do not find one another or one does not answer.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=max(1.0, timeout))
    )
    measured: list[dict[str, float]] = []
    for size in SIZES[backend]:
        if measured and measured[-1]["seconds"] * size / measured[-1]["bytes"] > _BUDGET_S:
            break
        measured.append(_one_size(size, rank, world_size, device))
    dist.destroy_process_group()
    return measured


def _one_size(size: int, rank: int, world_size: int, device: torch.device) -> dict[str, float]:
    pattern = torch.arange(size // 4, device=device, dtype=torch.float32) % 7  # small whole numbers: sums are exact
    tensor = pattern + rank
    dist.all_reduce(tensor)
    wrong = _agreed((tensor != world_size * pattern + world_size * (world_size - 1) / 2).sum().item(), device)
    # The first one also made the connections: how often there is time for it is told by the second.
    (once,) = _times(lambda: dist.all_reduce(tensor), device, repeats=1)
    repeats = max(1, min(_MOST_REPEATS, int(_BUDGET_S / _agreed(once, device))))
    seconds = _agreed(statistics.median(_times(lambda: dist.all_reduce(tensor), device, repeats)), device)
    return {
        "bytes": size,
        "seconds": seconds,
        "algorithm_gb_per_s": size / seconds / 1e9,
        "bus_gb_per_s": size / seconds / 1e9 * 2 * (world_size - 1) / world_size,
        "wrong": wrong,
    }


def _agreed(value: float, device: torch.device) -> float:
    """The largest value over all ranks."""
    tensor = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def _times(call: Callable[[], Tensor | object], device: torch.device, repeats: int = _REPEATS) -> list[float]:
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
