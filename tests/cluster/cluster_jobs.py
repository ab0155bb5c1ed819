"""Ranks of `lisa-ds check` as separate processes, with mounts or networks of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lisa_ds.cluster.environment import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30  # where all is well, nobody waits for it
SEEN_S = 120  # torch is loaded, on a busy machine slowly

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare, to mount for one rank alone"
)


class Job:
    """Ranks that are started one by one, as a launcher on each host would."""

    def __init__(
        self, folder: Path, world_size: int, *arguments: str, port: int = 0, address: str = "127.0.0.1"
    ) -> None:
        self._folder = folder
        self._arguments = ["check", "--timeout", str(TIMEOUT_S), *arguments]
        self._common = {
            "PYTHONPATH": str(ROOT),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port or free_port()),
            "LISA_DS_CACHE": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self._ranks: list[subprocess.Popen[str]] = []

    def start(self, rank: int, host: str, *before: str, **environment: str) -> Job:
        """Start a rank; ``before`` is a command that runs the rest of its line."""
        slurm = {"SLURMD_NODENAME": host} if host else {}
        self._ranks.append(
            subprocess.Popen(
                [*before, sys.executable, "-m", "lisa_ds.cli", *self._arguments],
                cwd=self._folder,
                env=os.environ | self._common | {"RANK": str(rank)} | slurm | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return self

    def signal(self, rank: int, number: int) -> None:
        self._ranks[rank].send_signal(number)

    def end_of(self, rank: int) -> subprocess.CompletedProcess[str]:
        """What became of one rank; the others are killed."""
        try:
            out, err = self._ranks[rank].communicate(timeout=SEEN_S)
        finally:
            for other in self._ranks:
                other.kill()
        return subprocess.CompletedProcess(self._ranks[rank].args, self._ranks[rank].returncode, out, err)

    def end(self) -> list[subprocess.CompletedProcess[str]]:
        """What became of the ranks, in the order of their start."""
        done = []
        deadline = time.monotonic() + SEEN_S
        try:
            for rank in self._ranks:
                out, err = rank.communicate(timeout=deadline - time.monotonic())
                done.append(subprocess.CompletedProcess(rank.args, rank.returncode, out, err))
        finally:
            for rank in self._ranks:
                rank.kill()
        return done


def mounted(*commands: str) -> tuple[str, ...]:
    """A command that sees other mounts than everybody else."""
    return ("unshare", "--mount", "sh", "-ec", "\n".join((*commands, 'exec "$@"')), "sh")


def read_only(path: str) -> tuple[str, str]:
    return (f"mount --bind {path} {path}", f"mount -o remount,bind,ro {path}")


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What rank 0 printed of errors, without the line that counts them."""
    first, *lines = done.stderr.splitlines()
    assert first.startswith(f"lisa-ds: error: {len(lines)} error"), done.stderr
    return lines


@contextmanager
def two_hosts() -> Iterator[tuple[list[str], str]]:
    """Two network namespaces on a bridge: the commands that enter them, and the address of the first."""
    tag, net = "lisachk", "10.231.9"
    made: list[list[str]] = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        made.append(["ip", "link", "del", f"{tag}br"])
        ip("link", "add", f"{tag}br", "type", "bridge")
        ip("link", "set", f"{tag}br", "up")
        for i in ("1", "2"):
            made.append(["ip", "netns", "del", f"{tag}{i}"])
            ip("netns", "add", f"{tag}{i}")
            ip("link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", f"{tag}{i}")
            ip("link", "set", f"{tag}v{i}", "master", f"{tag}br", "up")
            ip("-n", f"{tag}{i}", "addr", "add", f"{net}.{i}/24", "dev", "eth0")
            ip("-n", f"{tag}{i}", "link", "set", "eth0", "up")
            ip("-n", f"{tag}{i}", "link", "set", "lo", "up")
        yield [f"{tag}1", f"{tag}2"], f"{net}.1"
    finally:
        for command in reversed(made):
            subprocess.run(command, capture_output=True)
