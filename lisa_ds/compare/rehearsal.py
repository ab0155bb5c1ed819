"""Checks every arm as its run would, and cuts and tokenises the data, in a process of its own: torch and a GPU are let go again.

``python -m lisa_ds.compare.rehearsal JSON`` is that process, see :func:`rehearse`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

from lisa_ds.compare.arms import override
from lisa_ds.compare.protocol import STAGES
from lisa_ds.compare.request import Request
from lisa_ds.config import load_config
from lisa_ds.errors import ConfigError, LisaError


def rehearse(request: Request, *, force: bool = False) -> dict[str, int]:
    """Rows by part: ``train``, ``select``, ``verdict``.

    Args:
        request: What is compared.
        force: Whether runs that the planner says cannot fit are tried.

    Raises:
        ConfigError: An arm cannot run here, or there are too few rows; the message is that of its run.
    """
    asked = {
        "file": request.file,
        "overrides": request.overrides,
        "arms": [[arm.where, arm.overrides()] for arm in request.arms],
        "force": force,
    }
    ranks = str(request.ranks)
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    if request.on_cpu:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out by itself, with many warnings
    done = apart(json.dumps(asked), environment)
    if done.returncode == LisaError.exit_code:
        raise ConfigError(done.stderr.rpartition("\x1e")[2].strip())
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode:
        raise ConfigError(f"compare: the rehearsal ended with exit code {done.returncode}: see above")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def apart(asked: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Start that process, and wait for it."""
    command = [sys.executable, "-m", "lisa_ds.compare.rehearsal", asked]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def main() -> int:
    """Check what the first argument names, and print the rows by part as JSON."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        rows = _check(asked)
    except LisaError as error:
        print(f"\x1e{error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(rows))
    return 0


def _check(asked: dict[str, Any]) -> dict[str, int]:
    from lisa_ds import data
    from lisa_ds.models import load_tokenizer
    from lisa_ds.train import checks

    for where, changes in asked["arms"]:
        checks.check(load_config(asked["file"], asked["overrides"], {where: changes}), force=asked["force"])
    rows: dict[str, int] = {}
    for part in STAGES.values():
        config = load_config(asked["file"], [*asked["overrides"], override("data.eval_part", part)])
        train, held_out = data.load_dataset(config.data, load_tokenizer(config.model), task=config.model.task)
        assert held_out is not None
        rows |= {"train": len(train), part: len(held_out)}
    return rows


if __name__ == "__main__":
    sys.exit(main())
