"""Run a function in a process of its own: with another environment, or because it may crash."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.ranks import fork_context, set_environment


def run_isolated(
    body: Callable[..., Any],
    folder: Path,
    *args: Any,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
    timeout_s: float = 300,
) -> Any:
    """What ``body(*args)`` returns, called in a process with ``env`` added to the environment.

    Given an environment the process is a ``fresh`` one, as libraries read theirs when they are imported; else it is forked from one
    that has imported them, see :mod:`tests.ranks`.

    ``body`` is a module-level function, and what it returns is pickled.

    Raises:
        AssertionError: It raised (its traceback is in the message), died or hung.
    """
    place = folder / "result"
    place.unlink(missing_ok=True)
    code = exit_code(body, folder, *args, env=env, fresh=fresh, timeout_s=timeout_s)
    told = pickle.loads(place.read_bytes()) if place.exists() else None
    assert code == 0, f"exit code {code}\n{told or 'no traceback: a crash in native code, or it hung'}"
    return told


def exit_code(
    body: Callable[..., Any],
    folder: Path,
    *args: Any,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
    timeout_s: float = 300,
) -> int:
    """How such a process ends: 0, 1 after an exception, or minus the signal that killed it."""
    environment = {**os.environ, **(env or {})}
    context = multiprocessing.get_context("spawn") if env or fresh else fork_context()
    with set_environment(environment):
        process = context.Process(target=_main, args=(body, folder / "result", environment, args))
        process.start()
    process.join(timeout_s)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _main(body: Callable[..., Any], place: Path, environment: dict[str, str], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # a forked process has that of the one it was forked from
    os.environ.update(environment)
    try:
        result = pickle.dumps(body(*args))
    except BaseException:
        place.write_bytes(pickle.dumps(traceback.format_exc()))
        os._exit(1)
    place.write_bytes(result)
    os._exit(0)
