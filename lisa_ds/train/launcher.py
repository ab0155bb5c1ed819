"""Starts the stock ``deepspeed`` launcher for a run: number of ranks, port, and forwarding of signals.

The launcher kills its ranks when it is signalled, 30 seconds later by force. So it is started in a process group of its
own, and signals to this process are passed on to the ranks alone, which save and stop:
:mod:`lisa_ds.cluster.preemption`.
"""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lisa_ds.cluster import environment
from lisa_ds.errors import ConfigError
from lisa_ds.terminal import INTERRUPTED, READER_GONE

MODULE = "lisa_ds.train"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TO_RANKS = signal.SIGUSR1
"""The signal sent to ranks, whichever was received: SIGTERM would have the launcher kill them."""

ONE_SIGNAL_S = 1.0
"""Seconds within which all signals count as one: `timeout` sends its own twice, as do a closing terminal and its
shell."""

LAST_WORDS_S = 5.0
"""Seconds for which output is read after a run's end: a tracker's helper process that outlives it may keep it open."""


@dataclass(frozen=True)
class Where:
    """Where a run is started, as the command line says: hosts, GPUs, port."""

    num_gpus: int | None = None
    hostfile: Path | None = None
    num_nodes: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


def num_devices() -> int:
    """GPUs that torch sees; without a driver torch is not imported, which takes seconds."""
    if not any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg")):
        return 0
    import torch

    return torch.cuda.device_count()


def options(where: Where, devices: int, environ: Mapping[str, str]) -> list[str]:
    """The launcher's own arguments.

    Args:
        where: On what to start.
        devices: GPUs of this host; without any, ranks run on the CPU.
        environ: Of this process.

    Raises:
        ConfigError: There are fewer GPUs than asked for, or this process is one of several ranks itself.
    """
    names = environment.started_by_mpi(environ)
    ranks = int(environ.get("WORLD_SIZE") or environ.get("SLURM_STEP_NUM_TASKS") or (names and environ[names[2]]) or 1)
    if ranks > 1:
        raise ConfigError(
            f"train: starts all ranks by itself, and is started {ranks} times here; have the launcher at hand start the "
            f"ranks: python -m {MODULE} --lisa_config FILE"
        )
    if where.hostfile is None and (where.num_nodes or where.master_addr):
        raise ConfigError("--num-nodes and --master-addr: several hosts are named by a file, --hostfile")
    chosen = ["--log_level", "critical"]  # what ranks say is enough; how they end is told below
    if where.hostfile is not None:
        chosen += ["--hostfile", str(where.hostfile)]
        for name in ("num_nodes", "num_gpus", "master_addr", "master_port"):
            value = getattr(where, name)
            chosen += [] if value is None else [f"--{name}", str(value)]
        return chosen
    chosen += ["--master_port", str(where.master_port or environment.free_port())]
    visible = [word.strip() for word in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    if devices and not all(word.isdecimal() for word in visible):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES: DeepSpeed's launcher takes numbers, got {','.join(visible)!r}; `nvidia-smi -L` tells those of "
            "the names"
        )
    if devices and where.num_gpus is None:
        return chosen
    if devices and (where.num_gpus or 0) > devices:
        raise ConfigError(f"--num-gpus: there are {devices} here, got {where.num_gpus}")
    if devices and visible:
        # The launcher forgets the variable where a number is given, and would take the first GPUs of the host.
        return [*chosen, "--include", f"localhost:{','.join(visible[: where.num_gpus])}"]
    return [*chosen, "--num_gpus", str(where.num_gpus or 1)]


def launch(options: Sequence[str], arguments: Sequence[str], environ: Mapping[str, str], *, remote: bool) -> int:
    """Print the command, start the launcher, and wait until it has ended.

    After the first of :data:`SIGNALS`, or when the reader of the output is gone, the run saves after its step and
    stops; a second SIGINT or SIGTERM ends it at once.

    Args:
        options: The launcher's options.
        arguments: Arguments of each rank.
        environ: Environment of all of them.
        remote: Whether ranks are on other hosts: the launcher itself is signalled then, and ends them.

    Returns:
        The launcher's exit code, which is that of the first rank that failed; 130 if the signal was that of Ctrl-C,
        :data:`READER_GONE` if the reader has gone.
    """
    words = [*options, "--module", MODULE, *arguments]
    watch = _Watch()
    before = {
        number: signal.signal(number, watch.hear) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        piped = _is_pipe(1)
        print("$", shlex.join(["deepspeed", *words]), flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *words],
            env=dict(environ),
            start_new_session=True,  # a terminal's Ctrl-C would reach the ranks as such
            preexec_fn=_be_deaf,
            stdout=subprocess.PIPE if piped else None,
            stderr=subprocess.STDOUT if piped and _is_pipe(2) and os.path.sameopenfile(1, 2) else None,
        )
        relay = threading.Thread(target=watch.relay, args=(process,), daemon=True)
        if piped:
            relay.start()
        code = watch.until_end(process, remote=remote)
        if piped:
            relay.join(LAST_WORDS_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if watch.reader_gone:
        return READER_GONE
    if signal.SIGINT in watch.heard:
        return INTERRUPTED
    if code < 0:
        return 128 + (watch.heard[0] if watch.heard else -code)
    if code > 128:
        print(f"lisa-ds: a rank was ended by {_name_of_end(code)}", file=sys.stderr)
    return code


class _Watch:
    """The signals received while the launcher runs."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.reader_gone = False
        self._last = -ONE_SIGNAL_S

    def hear(self, number: int, frame: object) -> None:
        before, self._last = self._last, time.monotonic()
        if self._last - before >= ONE_SIGNAL_S:
            self.heard.append(number)

    def relay(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on the ranks' output while somebody reads it: a closed pipe would end each rank with a traceback."""
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            while piece and not self.reader_gone:
                try:
                    piece = piece[os.write(1, piece) :]
                except BrokenPipeError:
                    self.reader_gone = True

    def until_end(self, process: subprocess.Popen[bytes], *, remote: bool) -> int:
        pause, next_time, told = 1.0, 0.0, False
        while process.poll() is None:
            time.sleep(0.1)
            if not remote and len([number for number in self.heard if number in (signal.SIGINT, signal.SIGTERM)]) > 1:
                os.killpg(process.pid, signal.SIGKILL)
                break
            if not self.heard and not self.reader_gone:
                continue
            if not told and self.heard:
                name = signal.Signals(self.heard[0]).name
                with suppress(OSError):  # the terminal may be what has gone
                    print(
                        f"lisa-ds: {name}: the run saves after its step and ends; once more ends it at once",
                        file=sys.stderr,
                    )
            told = True
            if time.monotonic() >= next_time:
                # More than once: a rank that is only just starting does not hear yet.
                if remote:
                    process.send_signal(signal.SIGTERM)
                else:
                    os.killpg(process.pid, TO_RANKS)
                next_time, pause = time.monotonic() + pause, min(2 * pause, 30)
        return process.wait()


def _be_deaf() -> None:
    """In the launcher's process, before it starts: ignore signals meant for the ranks, which set their own handlers."""
    signal.signal(TO_RANKS, signal.SIG_IGN)


def _is_pipe(descriptor: int) -> bool:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _name_of_end(code: int) -> str:
    try:
        name = signal.Signals(256 - code).name  # a launcher that exits with minus the number
    except ValueError:
        return f"exit code {code}"
    return f"{name}: has memory run out? dmesg may say" if name == "SIGKILL" else name
