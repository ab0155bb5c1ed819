"""Run a function in a process of its own: with another environment, or because it may crash."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def run_isolated(
    body: Callable[..., Any], folder: Path, *args: Any, env: Mapping[str, str] | None = None, timeout_s: float = 300
) -> Any:
    """What ``body(*args)`` returns, called in a fresh process with ``env`` added to the environment.

    ``body`` is a module-level function, and what it returns is pickled.

    Raises:
        AssertionError: It raised (its traceback is in the message), died or hung.
    """
    place = folder / "result"
    place.unlink(missing_ok=True)
    code = exit_code(body, folder, *args, env=env, timeout_s=timeout_s)
    told = pickle.loads(place.read_bytes()) if place.exists() else None
    assert code == 0, f"exit code {code}\n{told or 'no traceback: a crash in native code, or it hung'}"
    return told


def exit_code(
    body: Callable[..., Any], folder: Path, *args: Any, env: Mapping[str, str] | None = None, timeout_s: float = 300
) -> int:
    """How such a process ends: 0, 1 after an exception, or minus the signal that killed it."""
    before = dict(os.environ)
    os.environ.update(env or {})
    try:
        process = multiprocessing.get_context("spawn").Process(target=_main, args=(body, folder / "result", args))
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    process.join(timeout_s)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _main(body: Callable[..., Any], place: Path, args: tuple[Any, ...]) -> None:
    try:
        result = pickle.dumps(body(*args))
    except BaseException:
        place.write_bytes(pickle.dumps(traceback.format_exc()))
        os._exit(1)
    place.write_bytes(result)
    os._exit(0)
