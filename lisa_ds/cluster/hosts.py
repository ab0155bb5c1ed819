"""The host names of a job's ranks, also of hosts that do not answer."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lisa_ds.cluster.environment import host_names, tasks_per_node
from lisa_ds.errors import ClusterError


@dataclass(frozen=True)
class Place:
    """This process's rank and host, and the address where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    address: str
    """Where rank 0 is to be found: ``MASTER_ADDR``."""

    port: int
    agent_listens: bool = False
    """Whether torchrun's agent has opened the port already, so that rank 0 is a client as all others."""

    attempt: str = "0"
    """How often torchrun has restarted the ranks: its store still holds the values of earlier attempts."""

    @property
    def who(self) -> str:
        """``gpu7 (rank 3)``."""
        return f"{self.host} (rank {self.rank})"


def place(environ: Mapping[str, str]) -> Place:
    """Read it from the variables that a launcher, or :func:`lisa_ds.cluster.environment.fill`, has set.

    Raises:
        ClusterError: A variable is missing or is no number; all of them are named.
    """
    problems, numbers = [], {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = environ.get(name, "")
        if text.isdecimal():
            numbers[name] = int(text)
        else:
            problems.append(f"{name}: should be a whole number, got {text!r}")
    if not environ.get("MASTER_ADDR"):
        problems.append("MASTER_ADDR: should be the host of rank 0, got nothing")
    if not problems and not numbers["RANK"] < numbers["WORLD_SIZE"]:
        problems.append(f"RANK: should be less than WORLD_SIZE, {numbers['WORLD_SIZE']}, got {numbers['RANK']}")
    if problems:
        raise ClusterError("\n".join(f"{this_host(environ)}: {problem}; a launcher sets it" for problem in problems))
    return Place(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        host=this_host(environ),
        address=environ["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
        agent_listens=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def this_host(environ: Mapping[str, str]) -> str:
    """Slurm's name of this node inside a job, which ``scontrol`` and the node list use; else the host's own."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def expected(environ: Mapping[str, str], world_size: int, hostfile: Path | None = None) -> dict[int, str]:
    """The host of every rank, as far as it is known before any rank has spoken; empty if it is not.

    It is known from ``hostfile``, or inside a Slurm step whose tasks are distributed in blocks, which is Slurm's
    default.

    Args:
        environ: Environment variables of any rank.
        world_size: How many ranks there are.
        hostfile: A DeepSpeed hostfile, with lines such as ``gpu1 slots=8``, in the order of ranks.

    Raises:
        ClusterError: ``hostfile`` cannot be read, or a line of it is not one.
    """
    if hostfile is not None:
        slots = read_hostfile(hostfile)
    elif "SLURM_STEP_NODELIST" in environ and environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        names = host_names(environ["SLURM_STEP_NODELIST"])
        tasks = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        slots = list(zip(names, tasks, strict=False))
    else:
        return {}
    hosts = [name for name, count in slots for _ in range(count)]
    return dict(enumerate(hosts)) if len(hosts) == world_size else {}


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """Hosts and the number of ranks on each, from a DeepSpeed hostfile.

    Raises:
        ClusterError: It cannot be read, or a line is not one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ClusterError(f"--hostfile: {path} cannot be read: {error.strerror} (looked from {Path.cwd()})") from None
    slots = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key, _, count = words[-1].partition("=")
        if len(words) != 2 or key != "slots" or not count.isdecimal():
            raise ClusterError(f"{path}:{number}: should be a host and its ranks, as in 'gpu1 slots=8', got {line!r}")
        slots.append((words[0], int(count)))
    return slots
