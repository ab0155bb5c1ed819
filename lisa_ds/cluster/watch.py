"""Ranks that watch each other: the others name one that hangs, lags or fails, instead of waiting in silence.

A thread of each rank writes every second to a store of its own where the rank is: no collective, and nothing on the
training's stream. A rank reads what others wrote only when it is stuck itself.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from lisa_ds.cluster.preemption import Preempted
from lisa_ds.errors import ConfigError, LisaError

PATIENCE_S = 300.0
"""Seconds without progress after which a rank is named; the variable ``LISA_DS_WATCH_S`` overrides it, 0 for never."""

END_S = 10.0
"""Seconds that ranks go on after another has failed: by then most have met the same error, or the launcher ended
them."""

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_FAILED = "failed"


def patience() -> float:
    """Seconds without progress after which a rank is named, from the environment.

    Raises:
        ConfigError: It is not a number of seconds.
    """
    text = os.environ.get("LISA_DS_WATCH_S", "")
    try:
        seconds = float(text or PATIENCE_S)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(
            f"environment: LISA_DS_WATCH_S: should be a number of seconds, or 0 not to watch, got {text!r}"
        )
    return seconds


@dataclass
class _Peer:
    """What is known of another rank."""

    beat: int
    heard: float
    host: str
    pid: int
    phase: str
    still_s: float
    place: str
    waits: bool  # in a collective


class Watch:
    """The watch of one rank; every rank makes one, once the process group exists.

    Args:
        where: The phase that the rank's main thread is in, as text, and a count that changes with its progress.
        patience_s: See :data:`PATIENCE_S`; not 0.
    """

    def __init__(self, where: Callable[[], tuple[str, int]], patience_s: float) -> None:
        self._where, self._patience = where, patience_s
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._poll = min(1.0, patience_s / 10)
        self._store = self._open()
        self._beats = 0
        self._moved, self._count = time.monotonic(), -1
        self._peers: dict[int, _Peer] = {}
        self._answered = time.monotonic()
        self._told_at = patience_s
        self._failing = False  # by an error of its own
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lisa-ds watch", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the ``with``; an error that leaves it is published to the other ranks, which end too."""
        self._thread.start()
        try:
            yield
        except Preempted:  # on all ranks at the same place
            raise
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self._stopped.set()
            self._thread.join(2 * self._poll + 1)

    def _open(self) -> Any:
        timeout = timedelta(seconds=max(5.0, self._poll))
        address: list[Any] = [None]
        store = None
        if self._rank == 0:
            host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            address = [(host, store.port)]
        dist.broadcast_object_list(address, src=0)
        if store is None:
            host, port = address[0]
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        return store

    def _run(self) -> None:
        while not self._stopped.wait(self._poll):
            phase, count = self._where()
            now = time.monotonic()
            if count != self._count:
                self._count, self._moved, self._told_at = count, now, self._patience
            try:
                self._say(phase, now - self._moved)
                if not self._failing and self._store.check([_FAILED]):
                    self._end()
                if now - self._moved > self._patience / 2:
                    self._listen()
                self._answered = time.monotonic()
            except (RuntimeError, ValueError, OSError):  # rank 0 has the store: it does not answer
                pass
            now = time.monotonic()
            if now - self._moved >= self._told_at:
                self._told_at *= 2
                self._name(now - self._moved)

    def _say(self, phase: str, still_s: float) -> None:
        self._beats += 1
        place, waits = _place()
        state = [self._beats, socket.gethostname(), os.getpid(), phase, round(still_s, 1), place, waits]
        self._store.set(str(self._rank), json.dumps(state))

    def _listen(self) -> None:
        others = [str(rank) for rank in range(self._ranks) if rank != self._rank]
        known = [rank for rank in others if self._store.check([rank])]
        if not known:
            return
        for rank, said in zip(known, self._store.multi_get(known), strict=True):
            beat, host, pid, phase, still_s, place, waits = json.loads(said)
            before = self._peers.get(int(rank))
            heard = before.heard if before is not None and before.beat == beat else time.monotonic()
            self._peers[int(rank)] = _Peer(beat, heard, host, pid, phase, still_s, place, waits)

    def _silent(self) -> dict[int, str]:
        """Ranks that no longer write, each described in words."""
        limit, now = max(3 * self._poll, 2.0), time.monotonic()
        found = {}
        unanswered = now - self._answered
        for rank, peer in sorted(self._peers.items()):
            quiet = max(now - peer.heard, unanswered if rank == 0 else 0.0)
            if unanswered > limit and rank != 0:
                continue  # nothing is known of the others while rank 0 does not pass it on
            if quiet > limit:
                found[rank] = f"{_who(rank, peer)} {_fate(peer)}, last heard {quiet:.0f} s ago: {peer.phase}"
        if unanswered > limit and 0 not in found and self._rank != 0:
            found[0] = f"rank 0 does not answer, last heard {unanswered:.0f} s ago"
        return found

    def _name(self, still_s: float) -> None:
        """Name the ranks that are waited for, if this rank is the first of those that wait."""
        suspects = self._silent()
        if not suspects:
            mine = _place()[1]
            late = {rank: peer for rank, peer in self._peers.items() if not peer.waits}
            if mine and late:
                suspects = {
                    rank: f"{_who(rank, peer)} has been where it is for {peer.still_s:.0f} s: {peer.phase}, at {peer.place}"
                    for rank, peer in sorted(late.items())
                }
            elif not mine and any(peer.waits for peer in self._peers.values()):
                return  # it is this rank that the others wait for
        waiting = [rank for rank in range(self._ranks) if rank not in suspects]
        if waiting and waiting[0] != self._rank:
            return
        phase, place = self._where()[0], _place()[0]
        if suspects:
            text = f"{'; '.join(suspects.values())}. {_numbers(waiting)} for it, {phase}, at {place}"
        else:
            text = f"no rank has got on for {still_s:.0f} s: {phase}, at {place}"
        print(f"[rank {self._rank}] {text}", file=sys.stderr, flush=True)

    def _fail(self, error: Exception) -> None:
        """Tell the other ranks, and name those that are gone: they may be the reason of this rank's error."""
        kind = "" if isinstance(error, LisaError) else f"{type(error).__name__}: "
        told = [f"rank {self._rank} ({socket.gethostname()}, pid {os.getpid()}) failed: {kind}{error}"]
        told.append(str(error.exit_code if isinstance(error, LisaError) else 1))
        self._failing = True
        with suppress(RuntimeError, ValueError, OSError):
            if not self._store.check([_FAILED]):
                self._store.set(_FAILED, json.dumps(told))
        if self._rank and isinstance(error, LisaError):
            return
        self._hear()
        time.sleep(
            max(3 * self._poll, 2.0) + self._poll
        )  # rank 0 has the store: the others hear of it before it leaves
        self._hear()
        if not isinstance(error, LisaError) and (silent := self._silent()):
            print(f"[rank {self._rank}] {'; '.join(silent.values())}", file=sys.stderr, flush=True)

    def _hear(self) -> None:
        with suppress(RuntimeError, ValueError, OSError):
            self._listen()
            self._answered = time.monotonic()

    def _end(self) -> None:
        """End this process too, unless it ends by itself."""
        told, code = json.loads(self._store.get(_FAILED))
        if not self._stopped.wait(END_S) and not self._failing:
            print(f"[rank {self._rank}] ends, as {told}", file=sys.stderr, flush=True)
            os._exit(int(code))


def _who(rank: int, peer: _Peer) -> str:
    return f"rank {rank} ({peer.host}, pid {peer.pid})"


def _fate(peer: _Peer) -> str:
    """What has become of a silent rank, if it is on this host."""
    if peer.host != socket.gethostname():
        return "is silent"
    try:
        state = Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "is dead"
    return {"T": "is stopped", "Z": "is dead"}.get(state, "is silent")


def _place() -> tuple[str, bool]:
    """Where the main thread is: the innermost line of it, and whether that is inside of a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end", False
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
    waits = False
    at: Any = frame
    while at is not None and not waits:
        waits = any(part in at.f_code.co_filename for part in _COLLECTIVES)
        at = at.f_back
    return place, waits


def _numbers(ranks: list[int]) -> str:
    """``rank 3 waits`` or ``ranks 0-2, 4 wait``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text} waits" if len(ranks) == 1 else f"ranks {text} wait"
