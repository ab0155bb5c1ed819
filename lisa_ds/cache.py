"""A cache on disk for what is built once per machine: an entry appears whole or not at all, whoever asks for it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lisa_ds.errors import ConfigError

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """``$LISA_DS_CACHE``, or ``~/.cache/lisa_ds``."""
    chosen = os.environ.get("LISA_DS_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lisa_ds"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the directory ``name`` of the cache; build it first if it is not there.

    ``build`` fills an empty directory beside it, which is renamed when it is complete. Other processes wait;
    after a crash the next one starts afresh. Every machine that has a cache of its own builds its own entry.

    Args:
        name: Path inside the cache. It must say everything the content depends on.
        build: Called with the directory to fill.

    Raises:
        ConfigError: The cache cannot be written.
    """
    place = cache_dir() / name
    if place.is_dir():
        return place
    with _locked(place):
        if place.is_dir():
            return place
        for abandoned in place.parent.glob(f".{place.name}.*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            build(unfinished)
            unfinished.chmod(0o755)  # mkdtemp's 0700 would keep a shared cache to its first user
            unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return place


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{place}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            _log.info("waiting for another process to build %s", place)
            lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"LISA_DS_CACHE: cannot write to {place.parent} ({error.strerror}); "
            f"set LISA_DS_CACHE to a directory that can be written"
        ) from None
    try:
        yield
    finally:
        lock.release()
