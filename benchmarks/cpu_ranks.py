"""Starts the ranks of a benchmark: this host's CPU, one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lisa_ds.cluster.environment import free_port


def on_ranks(script: str, count: int, folder: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What each rank of ``script`` wrote to the file of its ``--into``.

    Args:
        script: Of the benchmark; it gets ``--into`` and ``arguments``.
        count: Of ranks.
        folder: Where the files are.
        arguments: The other arguments of each.
    """
    port, ranks = str(free_port()), []
    for rank in range(count):
        environment = os.environ | {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            **{"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        }
        command = [sys.executable, script, "--into", str(folder / f"{rank}.json"), *arguments]
        ranks.append(subprocess.Popen(command, env=environment, stdout=None if rank == 0 else subprocess.DEVNULL))
    if any([process.wait() for process in ranks]):
        raise SystemExit("a rank failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
