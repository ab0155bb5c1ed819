"""What a rank finds on its host, and how the hosts of a job differ."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lisa_ds
from lisa_ds import records
from lisa_ds.cluster.findings import Finding, odd_ones
from lisa_ds.cluster.hosts import Place

SHM_BYTES = 1 << 30
"""Shared memory below which NCCL and data loaders are known to fail; a container's default is 64 MiB."""

FREE_GPU_SHARE = 0.9
"""Free share of a GPU's memory below which something else is using the GPU."""

_PACKAGES = ("deepspeed", "transformers", "triton", "accelerate", "datasets")  # torch: the one that was loaded


@dataclass(frozen=True)
class Facts:
    """What one rank has found. Sizes in bytes."""

    host: str
    local_rank: int
    versions: dict[str, str]
    gpus: list[str]
    """The names of the GPUs that this rank sees."""

    gpu_free: float | None
    """Share of this rank's GPU memory that is free."""

    memory: int
    memory_free: int
    shm: int | None
    open_files: int
    """The soft limit of open files; -1 for none."""

    locked: int
    """The limit of locked memory; -1 for none."""

    has_rdma: bool
    """Whether there is an InfiniBand or RoCE device, which locks memory."""


def device_name() -> str:
    """This rank's GPU, or ``CPU``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def devices(ranks: int) -> str:
    """The hardware of so many ranks like this one, in words: ``2 x CPU``."""
    return f"{ranks} x {device_name()}"


def collect(place: Place) -> Facts:
    """Look around on this host; nothing is changed."""
    has_cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if has_cuda else 0
    gpu_free = None
    if place.local_rank < count:
        free, total = torch.cuda.mem_get_info(place.local_rank)
        gpu_free = free / total
    memory, memory_free = _memory()
    return Facts(
        host=place.host,
        local_rank=place.local_rank,
        versions=_versions(has_cuda),
        gpus=[torch.cuda.get_device_name(i) for i in range(count)],
        gpu_free=gpu_free,
        memory=memory,
        memory_free=memory_free,
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        has_rdma=any(Path("/sys/class/infiniband").glob("*")),
    )


def differences(facts: Mapping[int, Facts]) -> list[Finding]:
    """Findings about what has to be the same on all hosts, and is not."""
    hosts: dict[str, Facts] = {}
    for one in facts.values():
        hosts.setdefault(one.host, one)
    findings = []
    for package in dict.fromkeys(name for one in facts.values() for name in one.versions):
        versions: dict[str, Any] = {}
        for rank, one in facts.items():
            version = one.versions.get(package)
            at_odds = versions.setdefault(one.host, version) != version  # with itself: two environments on one host
            if at_odds:
                versions[f"{one.host} (rank {rank})"] = version
        findings += odd_ones(versions, package, "install the same on all hosts, or use one shared environment")
    gpus = {host: f"{len(one.gpus)} x {'/'.join(sorted(set(one.gpus)))}" for host, one in hosts.items() if one.gpus}
    gpus = {host: gpus.get(host, "") for host in hosts}
    return findings + odd_ones(gpus, "GPUs", "use hosts of one kind, or see why the driver does not show the others")


def shortages(facts: Mapping[int, Facts]) -> list[Finding]:
    """Findings about memory and limits that a run may exhaust."""
    findings = []
    ranks_on: dict[str, int] = {}
    for one in facts.values():
        ranks_on[one.host] = ranks_on.get(one.host, 0) + 1
    open_files = max(1024, 256 + 8 * len(facts))  # a connection to every rank, and the data loader's
    for rank, one in facts.items():
        if one.gpus and one.local_rank >= len(one.gpus):
            what = f"{len(one.gpus)} GPUs for {ranks_on[one.host]} ranks"
            findings.append(Finding(one.host, what, "start a rank for each GPU"))
        if one.gpu_free is not None and one.gpu_free < FREE_GPU_SHARE:
            what = f"{one.gpu_free:.0%} of its GPU's memory is free"
            findings.append(
                Finding(f"{one.host} (rank {rank})", what, "see with nvidia-smi what else uses it", is_error=False)
            )
        if one.shm is not None and one.shm < SHM_BYTES:
            what = f"/dev/shm has {one.shm / 2**20:.0f} MiB"
            findings.append(
                Finding(one.host, what, "give the container more, such as --shm-size=8g or --ipc=host", is_error=False)
            )
        if 0 <= one.open_files < open_files:
            what = f"a process may open {one.open_files} files"
            findings.append(Finding(one.host, what, f"ulimit -n {max(65536, open_files)}", is_error=False))
        if one.has_rdma and one.locked >= 0:
            what = f"a process may lock {one.locked / 2**20:.0f} MiB of memory, and RDMA locks all it sends"
            findings.append(Finding(one.host, what, "ulimit -l unlimited, where the ranks are started", is_error=False))
    return findings


def _versions(has_cuda: bool) -> dict[str, str]:
    """Versions of the packages that results depend on; those that are absent are left out."""
    found = records.versions(_PACKAGES)
    found["torch"] = torch.__version__
    found["lisa_ds"] = lisa_ds.__version__
    if (commit := records.commit()) != "unknown":
        found["lisa_ds"] += f" at {commit}"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if has_cuda and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _memory() -> tuple[int, int]:
    """Bytes of memory in total, and available to a new program; those of the control group, if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit reads "max"
        return total, free
    return min(total, limit), max(0, min(free, limit - used))
