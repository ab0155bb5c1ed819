"""Other hosts, which DeepSpeed's launcher reaches over ssh: checks them, and exports environment variables to them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from lisa_ds.cluster import hosts
from lisa_ds.errors import ClusterError

SSH_TIMEOUT_S = 10

_PASSED_ON = re.compile(
    r"PATH|VIRTUAL_ENV|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM|(DS|GLOO|HF|LISA|TORCH|TRITON|WANDB)_[A-Z0-9_]+"
)
"""Variables passed on besides those of the launcher itself: names that begin with PYTHON, NCCL and a few more."""


def check_hosts(hostfile: Path) -> int:
    """Check that the hosts of a file can be reached as the launcher needs; it would fail with a traceback.

    Returns:
        How many there are.

    Raises:
        ClusterError: The file cannot be read or names no host, or a host cannot be reached.
    """
    names = [name for name, _ in hosts.read_hostfile(hostfile)]
    if not names:
        raise ClusterError(f"--hostfile: {hostfile} names no host")
    for program in ("ssh", *(["pdsh"] if len(names) > 1 else [])):
        if shutil.which(program) is None:
            raise ClusterError(f"--hostfile: the launcher needs {program}, which is not installed on this host")
    for name in names:
        command = ["ssh", "-n", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}", name, "true"]
        if subprocess.run(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            raise ClusterError(
                f"--hostfile: {hostfile}: {name} is not reachable by ssh without a password; try: {' '.join(command)}"
            )
    return len(names)


def exports(environ: Mapping[str, str]) -> Iterator[str]:
    """Lines of the file (``DS_ENV_FILE``) from which the launcher sets environment variables on all hosts.

    ``LISA_ENV`` names others, separated by spaces.

    Raises:
        ClusterError: A value cannot be passed on through a shell.
    """
    wanted = environ.get("LISA_ENV", "").split()
    for name, value in environ.items():
        if name == "DS_ENV_FILE" or not (_PASSED_ON.fullmatch(name) or name in wanted):
            continue
        if set(value) & set('"`$\\\n'):
            raise ClusterError(
                f"{name}: cannot be passed on to other hosts: it has quotes, dollars or line ends; unset it"
            )
        yield f"{name}={value}"
