"""Run a function on several real ranks, on CPU, from inside one pytest test."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from lisa_ds.cluster.environment import free_port

T = TypeVar("T")
K = TypeVar("K")

PRELOAD_S = 900  # what ranks import, and DeepSpeed's operators compiled, where it is the first time
START_S = 60  # ranks import torch and DeepSpeed before the clock of the body starts, on a busy machine slowly


def run_ranks(
    world_size: int, body: Callable[..., T], tmp_path: Path, *args: Any, timeout_s: float = 120, gpus: bool = False
) -> list[T]:
    """Call ``body(*args)`` on ``world_size`` gloo ranks and return what each returned, by rank.

    ``body`` must be a module-level function (it is pickled), and what it returns is pickled too. The process group
    exists when it is called: ``deepspeed.initialize`` finds it. Ranks meet through a file, so there is no port to
    collide on. The first rank that fails fails the test with its traceback; a hang fails it with the stack of every
    thread.

    CPU ranks are forked from one process that has imported what they need: importing takes seconds, a fork none, and
    each rank is still a process of its own that begins with nothing of the one before. With ``gpus`` ranks are started
    afresh and see what GPUs the test sees: CUDA reads which are visible when it is touched first, an import may touch
    it, and it does not survive a fork.
    """
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    port = free_port()
    context = multiprocessing.get_context("spawn") if gpus else fork_context()
    ranks: list[BaseProcess] = []
    try:
        for rank in range(world_size):
            environment = rank_environment(rank, world_size, port, gpus)
            with set_environment(environment):
                process: BaseProcess = context.Process(
                    target=_rank_main, args=(rank, world_size, environment, folder, body, args, timeout_s)
                )
                process.start()
                ranks.append(process)
        _wait(ranks, deadline=time.monotonic() + START_S + timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    failures = sorted(folder.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
    codes = [process.exitcode for process in ranks]
    if failures or any(codes):
        reports = failures or [path for path in sorted(folder.glob("*.stack")) if path.stat().st_size]
        reason = "failed" if failures else f"hung or died (exit codes {codes})"
        text = reports[0].read_text() if reports else "no traceback: killed from outside, or a crash in native code"
        pytest.fail(f"rank {reports[0].stem if reports else '?'} of {world_size} {reason}\n{text}", pytrace=False)
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


class Runs(Generic[K, T]):
    """What the ranks of a case returned, by the case's key: run when it is first asked for, and once.

    So a test of one case waits for that case alone, and a case that fails fails the tests that ask for it.
    """

    def __init__(self, run: Callable[[K], T]) -> None:
        self._run = run
        self._known: dict[K, T] = {}
        self._failed: dict[K, BaseException] = {}

    def __getitem__(self, key: K) -> T:
        if key in self._failed:
            raise self._failed[key]
        if key not in self._known:
            try:
                self._known[key] = self._run(key)
            except BaseException as failure:
                self._failed[key] = failure
                raise
        return self._known[key]


def _wait(ranks: list[BaseProcess], deadline: float) -> None:
    """Until all are done, one has failed, or it is too late; a failing rank's peers would wait for it for ever."""
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            time.sleep(1)  # the peers may be about to tell of the same mistake
            return
        time.sleep(0.02)


def _rank_main(
    rank: int,
    world_size: int,
    environment: dict[str, str],
    folder: Path,
    body: Callable[..., Any],
    args: tuple[Any, ...],
    timeout_s: float,
) -> None:
    os.environ.clear()  # a forked rank has that of the process it was forked from
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stack)
        try:
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder / 'rendezvous'}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            result = pickle.dumps(body(*args))
            (folder / f"{rank}.result").write_bytes(result)
            dist.barrier()  # no rank leaves while another still reads from it
            dist.destroy_process_group()
        except BaseException:
            (folder / f"{rank}.failed").write_text(traceback.format_exc())
            os._exit(1)  # the orderly way out waits for peers
        faulthandler.cancel_dump_traceback_later()
        os._exit(0)  # threads of libraries may abort an orderly exit, with all work done


@functools.cache
def fork_context() -> multiprocessing.context.ForkServerContext:
    """Where CPU ranks are forked, by one process for the whole session, started now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    # The process looks for modules where this one does. It keeps the environment it is started with, and its ranks get theirs anew.
    with set_environment(
        {**rank_environment(0, 1, 0), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ):
        forkserver.ensure_running()
    # On a fresh machine it compiles DeepSpeed's operators first, which takes minutes: before the clock of any rank starts.
    first = context.Process(target=_nothing)
    first.start()
    first.join(PRELOAD_S)
    if first.exitcode != 0:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
        pytest.exit(
            f"no ranks after {PRELOAD_S} s: see `python -m tests.preloaded`; a compilation that was killed leaves a file 'lock' "
            f"below {folder}, for which all others wait: remove it",
            returncode=2,
        )
    return context


def _nothing() -> None:
    pass


def rank_environment(rank: int, world_size: int, port: int, gpus: bool = False) -> dict[str, str]:
    """The environment a launcher would give."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),  # for code that insists on one; the group itself meets through a file
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cuda" if gpus else "cpu",
    }
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the same test on a machine with one GPU: ranks are CPU ranks
    return environment


@contextlib.contextmanager
def set_environment(environment: dict[str, str]) -> Iterator[None]:
    """``environment``, inherited by a process that is started inside."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
