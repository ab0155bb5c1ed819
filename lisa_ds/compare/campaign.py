"""Starts the runs of a comparison, several at once, until none is left, time is up, or somebody stops it."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lisa_ds.compare import collect, process, results
from lisa_ds.compare.pace import Pace
from lisa_ds.compare.process import Process
from lisa_ds.compare.protocol import Progress, Run
from lisa_ds.compare.request import Request
from lisa_ds.compare.results import Result
from lisa_ds.errors import ConfigError, DataError
from lisa_ds.train.launcher import SIGNALS

POLL_S = 0.2
"""Seconds between two looks at the runs."""


@dataclass(frozen=True)
class Options:
    """How runs are started; none of it changes what they measure, but for the time they take."""

    workers: int = 1
    """Runs at a time; they share the GPUs."""

    deadline_s: float | None = None
    """Seconds from now after which nothing runs: no run starts that would not end before, and the others save and stop."""

    keeps_models: bool = True
    """Whether the models of the verdict are kept."""

    force: bool = False
    """Whether runs that the planner says cannot fit are tried."""

    command: str = ""
    """What was typed, for the report."""


@dataclass
class Campaign:
    """The runs of a comparison.

    Args:
        request: What is compared.
        options: How runs are started.
        rehearse: Called before the first run is started; returns rows by part, and raises what a run would.
    """

    request: Request
    options: Options
    rehearse: Callable[[], dict[str, int]]
    results: dict[Run, Result] = field(default_factory=dict)
    failures: dict[Run, str] = field(default_factory=dict)
    stopped: set[Run] = field(default_factory=set)
    interrupted: int = 0
    """The signal that ended it early; 0 for none."""

    def run(self) -> Progress:
        """Start what is missing, and wait for it.

        Returns:
            What has been measured.

        Raises:
            LisaError: Another comparison is in the directory, or somebody runs one there, or rows of two runs differ.
        """
        request, options = self.request, self.options
        self.pace = Pace(options.deadline_s)
        self.running: list[Process] = []
        self.heard: list[int] = []
        with self._locked() as lock:
            before = collect.read_about(request.out)
            if before is not None:
                request.check_same(before.settings["identity"], str(request.out / collect.FILE))
            self._read_finished()
            rows = before.settings["rows"] if before is not None else {}
            if self.progress.open() or not rows:
                self._say("checking every arm, and cutting and tokenising the data")
                rows = self.rehearse()
            self.request = request = request.kept()
            self.about = collect.About(request, rows, options.workers, options.command)
            self._write()
            left = sum(self.progress.left().values())
            self._say(f"{request.protocol.num_runs} runs, {left} of them left; {options.workers} at a time")
            with self._listening():
                try:
                    self._loop(lock)
                finally:
                    self._end_all()
        self._tell_end()
        return self.progress

    @property
    def progress(self) -> Progress:
        """What follows from what has been measured so far."""
        losses = {run: result.loss for run, result in self.results.items()}
        return Progress(self.request.protocol, losses, self.failures)

    def _loop(self, lock: int) -> None:
        stopping = False
        while True:
            if not stopping:
                self._start_some(lock)
            if not self.running:
                return
            time.sleep(POLL_S)
            for ended in [each for each in self.running if each.popen.poll() is not None]:
                self.running.remove(ended)
                self._take(ended, stopping=stopping)
            if self.pace.over and not stopping:
                self._say("time is up: runs save after their step and stop")
                stopping = True
                self._stop_all()
            if self.heard:
                self._heed(told=stopping)
                stopping = True

    def _start_some(self, lock: int) -> None:
        busy = {*self.stopped, *(each.run for each in self.running)}
        for run in self.progress.open():
            if len(self.running) >= self.options.workers:
                return
            if run in busy or not self.pace.in_time(run.arm):
                continue
            place = self.request.place(run)
            words = [self.request.file, *self.request.overrides_of(run)]
            words += [] if self.request.num_gpus is None else ["--num-gpus", str(self.request.num_gpus)]
            words += ["--force"] if self.options.force else []
            started = process.start(
                run, place, words, side_by_side=self.options.workers, ranks=self.request.ranks, holds=lock
            )
            self.running.append(started)
            self._say(f"started: {_told(run)}; output in {process.log_of(place)}")

    def _take(self, ended: Process, *, stopping: bool) -> None:
        run, code = ended.run, ended.popen.returncode
        if results.state(ended.place) == "finished":
            if not ended.resumed:  # of a resumed run this is the rest
                self.pace.took(run.arm, ended.seconds)
            self._accept(run, ended.place)
            loss = self.results[run].loss
            told = f"loss {loss:.4f} on {run.part}" if math.isfinite(loss) else "diverged"
            self._say(f"{_told(run)}: {told}, in {ended.seconds:.0f} s{self._time_left()}")
        elif stopping or code == 0:  # it was asked to stop, by this process or by another
            self.stopped.add(run)
            kept = "has saved" if results.state(ended.place) == "saved" else "had nothing to save"
            self._say(f"stopped: {_told(run)}; it {kept}")
            return
        else:
            self.failures[run] = f"exit code {code}; see {process.log_of(ended.place)}"
            self._say(f"FAILED: {_told(run)}: exit code {code}\n{ended.last_words()}")
        self._write()

    def _read_finished(self) -> None:
        """Take what earlier calls have measured; what becomes open by that may have been measured, too."""
        while found := [run for run in self.progress.open() if results.state(self.request.place(run)) == "finished"]:
            for run in found:
                self._accept(run, self.request.place(run))

    def _accept(self, run: Run, place: Path) -> None:
        result = results.read(place)
        for other, theirs in self.results.items():
            if other.seed == run.seed and (told := results.differences(result.order, theirs.order)):
                raise DataError(
                    f"{place}: cannot be compared with {self.request.place(other)}: it has {'; '.join(told)}. Both have seed "
                    f"{run.seed}, and all arms see the same rows in the same order; if the data has changed, choose another --out"
                )
        self.results[run] = result
        process.tidy(place, keeps_model=run.stage == "verdict" and self.options.keeps_models)

    def _write(self) -> None:
        collect.write(self.about, self.results, self.failures, self.progress)

    # ---- ends -----------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        for each in self.running:
            each.stop()

    def _end_all(self) -> None:
        """Wait for runs that are still there because of an error, having asked them to stop."""
        self._stop_all()
        while any(each.popen.poll() is None for each in self.running):
            time.sleep(POLL_S)
            self._heed(told=True)

    def _heed(self, *, told: bool) -> None:
        """Have runs stop at the first signal that was heard, and end at the second; ``told`` if they have been asked to stop."""
        while self.heard:
            again, self.interrupted = bool(self.interrupted), self.heard.pop(0)
            what = "runs save after their step and stop" if not told else "runs have been asked to save and stop"
            what = "runs end at once" if again else f"{what}; once more ends them at once"
            self._say(f"{signal.Signals(self.interrupted).name}: {what}")
            for each in self.running:
                (each.end if again else each.stop)()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda number, _: self.heard.append(number)) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Keep others out of the directory; runs inherit the lock, so that it also holds while one outlives this process."""
        out = self.request.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ConfigError(
                f"--out: {out}: another comparison is at work there, or a run of an earlier one"
            ) from None
        try:
            yield lock
        finally:
            os.close(lock)

    # ---- words ----------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        print(f"[{_clock(self.pace.elapsed)}] {text}", flush=True)

    def _time_left(self) -> str:
        done, left = len(self.results), self.progress.left()
        seconds = self.pace.left(left, self.options.workers)
        told = f"; {done} of {self.request.protocol.num_runs} runs have ended"
        return told if seconds is None or not any(left.values()) else f"{told}, about {_clock(seconds)} left"

    def _tell_end(self) -> None:
        left = sum(self.progress.left().values())
        parts = [f"{len(self.results)} runs have ended"]
        parts += [f"{len(self.failures)} have failed, and are tried again by the same command"] if self.failures else []
        parts += [f"{left} are left for the same command"] if left else []
        self._say("; ".join(parts))


def _told(run: Run) -> str:
    return f"{run.stage}: {run.arm}, seed {run.seed}, learning rate {run.rate:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
