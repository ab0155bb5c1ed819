"""Preemption: ranks note the scheduler's signal, agree on the step after which they stop, and leave a marker file.

Slurm sends a signal some time before it kills: at the time limit, on preemption, before maintenance. A handler here
only notes it. The signal may reach ranks at different moments, or one rank alone, and a rank that left at once would
leave the others waiting in a collective. So at the end of every step an all-reduce tells all ranks, and all leave after
the same step.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lisa_ds.run_log import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm's own, that of ``--signal=USR1@...``, and the one that submitit uses."""

MARKER = PREEMPTED
"""File in a run's ``output_dir`` that says it was preempted and may be continued."""


class Preempted(Exception):
    """The run has stopped because of a signal. It is no error: all ranks raise it at the same place, and exit with 0.

    Args:
        step: Optimizer steps that have been made.
        checkpoint: The one from which the run can be resumed; None if there was nothing to save.
        signum: The signal's number.
    """

    def __init__(self, step: int, checkpoint: Path | None, signum: int) -> None:
        self.step = step
        self.checkpoint = checkpoint
        self.signal = signal.Signals(signum).name
        super().__init__(
            f"{self.signal} after step {step}, {f'saved to {checkpoint}' if checkpoint else 'nothing to save'}"
        )


class Preemption:
    """Signals that this process has received, and whether any rank has received one."""

    def __init__(self) -> None:
        self.heard = 0
        """Number of the first signal that came to this rank; 0 before."""
        self._group: Any = None

    @contextmanager
    def listening(self) -> Iterator[Preemption]:
        """Note :data:`SIGNALS` instead of being ended by them; after the block the earlier handlers are back.

        Only the main thread may call it.
        """
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def marked(self, output_dir: Path) -> Iterator[None]:
        """Remove the marker of an earlier attempt from ``output_dir``; write a new one if the block raises `Preempted`.

        Every rank enters it, once the process group exists.
        """
        self.join()
        forget(output_dir)
        try:
            yield
        except Preempted as preempted:
            marker = self.leave(output_dir, preempted)
            if _is_rank_0():
                print(f"preempted by {preempted}; {marker} says so; go on with --resume auto", flush=True)
            raise

    def join(self) -> None:
        """Prepare for :meth:`agreed`, once the process group exists. Every rank calls it.

        Signals reach the host, so ranks use a gloo group: with NCCL each all-reduce would wait for the GPU.
        """
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def agreed(self) -> int:
        """The largest signal number that any rank has received, 0 for none. Every rank must call it.

        One all-reduce of four bytes.
        """
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return self.heard
        heard = torch.tensor([self.heard], dtype=torch.int32)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX, group=self._group)
        return int(heard)

    def leave(self, output_dir: Path, preempted: Preempted) -> Path:
        """Write the marker, once all ranks have come here: what they save is on disk by then. Every rank calls it.

        Returns:
            The marker.
        """
        self.agreed()  # a barrier
        marker = output_dir / MARKER
        if _is_rank_0():
            fields = {
                "step": preempted.step,
                "checkpoint": preempted.checkpoint and str(preempted.checkpoint),
                "signal": preempted.signal,
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            output_dir.mkdir(parents=True, exist_ok=True)
            unfinished = marker.with_name(f".{MARKER}.unfinished")
            unfinished.write_text(json.dumps(fields) + "\n")
            unfinished.rename(marker)
        self.agreed()  # nobody ends before it is there: the end of one rank may be the end of the others
        return marker

    def _hear(self, number: int, frame: object) -> None:
        self.heard = self.heard or number


def forget(output_dir: Path) -> None:
    """Remove the marker of an earlier attempt of the run, on rank 0."""
    if _is_rank_0():
        with suppress(FileNotFoundError):
            (output_dir / MARKER).unlink()


def ignore() -> None:
    """Ignore :data:`SIGNALS` for the rest of the process: its work is done, and a signal would spoil its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _is_rank_0() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0
