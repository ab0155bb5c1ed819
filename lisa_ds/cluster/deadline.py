"""Deadlines for calls that may hang: on a file system, in a library, on another host."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from lisa_ds.errors import ClusterError

T = TypeVar("T")

_stuck = threading.Event()


class TookTooLong(ClusterError):
    """The call has not returned in time; its thread is left behind."""


def within(seconds: float, call: Callable[[], T], what: str) -> T:
    """What ``call()`` returns or raises, if it does so in time. It runs in a thread of its own.

    Raises:
        TookTooLong: It did not; the message is ``what`` and the time.
    """
    outcome: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if outcome:
        return outcome[0]
    _stuck.set()
    raise TookTooLong(f"{what} within {seconds:g} s")


def watch(seconds: float, who: str) -> threading.Timer:
    """End the process with code 2 and a message after ``seconds``, unless the timer is cancelled: the last resort."""

    def end() -> None:
        print(f"lisa-ds: error: {who}: the check did not end within {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def leave(code: int) -> int:
    """Return ``code``; end the process with it at once if a thread is stuck, for which an orderly end would wait."""
    if _stuck.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
