"""Run this checkout's programs from a test: as a user would start them, or on ranks that need not import anything first."""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from lisa_ds.cache import cache_dir
from lisa_ds.cluster.environment import free_port
from tests.ranks import fork_context, rank_environment, set_environment

ROOT = Path(__file__).parent.parent
_COMMON = cache_dir()


def own_cache(folder: Path) -> Path:
    """A cache of the test's own in ``folder``, but for the kernels: compiling them takes longer than most tests."""
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    (_COMMON / "ops").mkdir(parents=True, exist_ok=True)
    if not (cache / "ops").exists():
        (cache / "ops").symlink_to(_COMMON / "ops")
    return cache


def variables(folder: Path) -> dict[str, str]:
    """What a program is given beside this process's environment: this checkout, CPU ranks, one thread, its own cache."""
    return {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "LISA_DS_CACHE": str(own_cache(folder)),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def deepspeed(ranks: int) -> list[str]:
    """The stock launcher, at a free port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*launcher, "--num_gpus", str(ranks), "--master_port", str(free_port())]


def run(
    command: Sequence[str], folder: Path, env: Mapping[str, str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """A command as a user would give it in ``folder``."""
    return subprocess.run(
        list(command), cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout_s
    )


def on_ranks(
    ranks: int, command: Sequence[str], folder: Path, env: Mapping[str, str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """What ``deepspeed --num_gpus RANKS command`` does, in ``folder``, without the seconds in which everything is imported.

    Args:
        ranks: How many; 0 for a plain process without a launcher's environment.
        command: A script and its arguments.
        folder: Where it runs.
        env: Added to the environment.
        timeout_s: After which it is killed.

    Returns:
        The exit code of the first rank that failed, else 0, and what all ranks wrote.
    """
    port, context = free_port(), fork_context()
    with tempfile.TemporaryDirectory() as place:
        streams = [Path(place) / name for name in ("out", "err")]
        processes = []
        for rank in range(max(1, ranks)):
            environment = {**(rank_environment(rank, ranks, port) if ranks else os.environ), **env}
            with set_environment(environment):
                process = context.Process(target=_main, args=(list(command), str(folder), environment, streams))
                process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for process in processes:
            process.join(5 if any(process.exitcode for process in processes) else 0)  # as a launcher ends the others
            if process.is_alive():
                process.kill()
                process.join()
        codes = [process.exitcode or 0 for process in processes]
        out, err = (path.read_text() if path.exists() else "" for path in streams)
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(list(command), timeout_s, out, err)
        return subprocess.CompletedProcess(list(command), next(filter(None, codes), 0), out, err)


def _main(command: list[str], folder: str, environment: dict[str, str], streams: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, number in zip(streams, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
