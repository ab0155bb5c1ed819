"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A name beside ``target`` to write under; at the end that file takes the target's place, unless an error was raised.

    Args:
        target: The file; its directory is made if need be.

    Yields:
        ``.NAME.unfinished-PID``, of which there is no file yet.

    Raises:
        OSError: It cannot be written.
    """
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)  # of a killed process of the same number
        yield unfinished
        unfinished.replace(target)
    finally:
        with suppress(OSError):  # it has been renamed, or could not be made
            unfinished.unlink()
