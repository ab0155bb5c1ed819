"""One run as a process of its own: ``lisa-ds train``, by the stock launcher, its output in a file beside its directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lisa_ds.compare import results
from lisa_ds.compare.protocol import Run
from lisa_ds.run_log import RECORDS

TRAIN = (sys.executable, "-m", "lisa_ds.cli", "train")
"""The command that trains, to which file, overrides and options are added."""

_TOLD = 12
"""Lines of a failed run's output that are repeated."""


@dataclass
class Process:
    """A run that has been started."""

    run: Run
    place: Path
    popen: subprocess.Popen[bytes]
    resumed: bool = False
    """Whether an earlier attempt has done a part of it."""

    since: float = field(default_factory=time.monotonic)
    asked: bool = field(default=False, init=False)
    """Whether it has been asked to stop."""

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.since

    def stop(self) -> None:
        """Have it save after its step and end; not a second time, which would end it while it saves."""
        if not self.asked:
            self.asked = True
            self._signal()

    def end(self) -> None:
        """Have one that has been asked to stop end at once."""
        self._signal()

    def _signal(self) -> None:
        with suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGTERM)

    def last_words(self) -> str:
        """The end of its output."""
        return "\n".join(log_of(self.place).read_text(errors="replace").splitlines()[-_TOLD:])


def log_of(place: Path) -> Path:
    """The file with the output of the run in a directory."""
    return place.with_name(f"{place.name}.log")


def start(run: Run, place: Path, words: Sequence[str], *, side_by_side: int, ranks: int, holds: int) -> Process:
    """Start a run, or go on with it if it has saved; what is left of one that has not is removed.

    Args:
        run: Which.
        place: Its directory.
        words: Arguments of :data:`TRAIN`.
        side_by_side: Runs at a time, which share the cores.
        ranks: Of each.
        holds: A file descriptor that it keeps open.
    """
    resumes = results.state(place) == "saved"
    if resumes:
        (place / RECORDS).unlink(missing_ok=True)  # of an attempt that was ended while it wrote it
    else:
        shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if side_by_side > 1:  # a run takes all cores for its ranks otherwise
        cores = len(os.sched_getaffinity(0)) // (side_by_side * ranks)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    with log_of(place).open("ab" if resumes else "wb") as log:
        popen = launch([*words, *(["--resume", "auto"] if resumes else [])], environment, log, holds)
    return Process(run, place, popen, resumes)


def launch(words: Sequence[str], environment: dict[str, str], log: BinaryIO, holds: int) -> subprocess.Popen[bytes]:
    """:data:`TRAIN` with ``words``, in a session of its own: Ctrl-C is passed on, not heard by all runs at once."""
    return subprocess.Popen(
        [*TRAIN, *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        pass_fds=(holds,),
    )


def tidy(place: Path, *, keeps_model: bool) -> None:
    """Remove what a finished run needs no more: its checkpoints, and perhaps the exported model."""
    for path in [*place.glob("checkpoint-*"), *([] if keeps_model else [place / "model"])]:
        shutil.rmtree(path, ignore_errors=True)
