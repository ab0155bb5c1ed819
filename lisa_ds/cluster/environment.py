"""The environment variables that torch.distributed reads (``RANK`` and others), also under Slurm, MPI or no launcher.

``deepspeed`` and ``torchrun`` set ``RANK`` and its companions. ``srun`` starts a process for each task and sets ``SLURM_*``
variables instead; running ranks by it directly lets the scheduler's signals reach every one of them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

from lisa_ds.errors import ClusterError

FIRST_PORT, NUM_PORTS = 20_000, 40_000

_OF_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
)
"""Variables set by `mpirun` of Open MPI, of MVAPICH, and of MPICH and Intel: rank, local rank, ranks, ranks on the
host."""


def fill(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set ``RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT`` where no launcher has.

    Inside a Slurm step they are those of the task, under ``mpirun`` those of the process; otherwise it is a run on one rank.

    Raises:
        ClusterError: There are ranks on several hosts and the first host's name cannot be found out, or there is ``WORLD_SIZE``
            without ``RANK``.
    """
    if "RANK" in environ:
        return
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:  # a batch script has PROCID, too, but is no step
        environ["RANK"] = environ["SLURM_PROCID"]
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
        environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
        environ["LOCAL_WORLD_SIZE"] = str(_tasks_on_this_node(environ))
        environ.setdefault("MASTER_ADDR", first_host(environ))
        environ.setdefault("MASTER_PORT", str(port_of_job(environ["SLURM_JOB_ID"])))
        return
    if (names := started_by_mpi(environ)) is not None:
        _fill_from_mpi(environ, names)
        return
    if environ.get("WORLD_SIZE", "1") != "1":
        raise ClusterError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']}, but RANK is not set; a launcher sets both, and a run on one rank needs neither"
        )
    environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def started_by_mpi(environ: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """The names of the variables that an ``mpirun`` has set for this process; None if none has."""
    return next((names for names in _OF_MPI if all(name in environ for name in names)), None)


def _fill_from_mpi(environ: MutableMapping[str, str], names: tuple[str, str, str, str]) -> None:
    rank, local_rank, size, local_size = (environ[name] for name in names)
    if "MASTER_ADDR" not in environ and size != local_size:
        raise ClusterError(
            f"mpirun has started {size} ranks, {local_size} of them on this host: set MASTER_ADDR to the host of rank 0"
        )
    environ.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=local_size)
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", "29500")  # torch's own: ranks know it without talking


def port_of_job(job_id: str) -> int:
    """A port that all ranks of a Slurm job know without communication, and that two jobs on one host do not share.

    Example:
        >>> port_of_job("40012")
        20012
    """
    return FIRST_PORT + int(job_id) % NUM_PORTS


def first_host(environ: MutableMapping[str, str]) -> str:
    """The host of rank 0 of a Slurm step."""
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if not (hosts := host_names(nodes)):
        raise ClusterError(
            f"SLURM_STEP_NODELIST is {nodes!r}, but there is no scontrol to read it with (in a container?); "
            "set MASTER_ADDR to the first host in the batch script, as launch/train.sbatch does"
        )
    return hosts[0]


def host_names(nodes: str) -> list[str]:
    """The hosts of one of Slurm's lists, such as ``gpu[1-4]``; none where there is no ``scontrol`` to read it with."""
    if "[" not in nodes:
        return nodes.split(",")
    if shutil.which("scontrol") is None:
        return []
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10)
    return shown.stdout.split()


def free_port() -> int:
    """A free port on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tasks_per_node(counts: str) -> list[int]:
    """What Slurm writes as ``4(x2),3``: four tasks on each of the first two nodes, three on the next.

    Example:
        >>> tasks_per_node("4(x2),3")
        [4, 4, 3]
    """
    tasks: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks


def _tasks_on_this_node(environ: MutableMapping[str, str]) -> int:
    return tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
