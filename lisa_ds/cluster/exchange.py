"""How ranks exchange values during a check: through one store at the master's address, always with a deadline.

Rank 0 asks and tells, the others answer. Values are JSON.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError, DistStoreError

from lisa_ds.cluster.deadline import TookTooLong, within
from lisa_ds.cluster.findings import Finding
from lisa_ds.cluster.hosts import Place
from lisa_ds.errors import ClusterError

CLOCK_SAMPLES = 8
GRACE_S = 2.0
"""Seconds that rank 0 waits longer than other ranks, which may have to report that something took too long for them."""

_RETRY_S = 0.2


class NotMet(ClusterError):
    """A rank has not found the others."""

    def __init__(self, place: Place, what: str, remedy: str) -> None:
        self.finding = Finding(place.who, what, remedy)
        super().__init__(str(self.finding))


def meet(place: Place, timeout: float) -> Exchange:
    """Open the store on rank 0; connect to it on other ranks.

    Raises:
        NotMet: The port is taken, or the master cannot be reached; says from where and why.
    """
    here = f"{place.address}:{place.port}"
    opens = place.rank == 0 and not place.agent_listens
    deadline = time.monotonic() + timeout
    try:
        if opens:
            _check_free(place, here)
        else:
            _knock(place, here, deadline)
        store = within(
            max(1.0, deadline - time.monotonic()),
            lambda: TCPStore(
                place.address,
                place.port,
                place.world_size,
                is_master=opens,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            ),
            "no answer",
        )
    except TookTooLong:
        what = "does not answer" if opens else "takes connections, but does not answer as rank 0's store"
        remedy = "set MASTER_ADDR to an address of rank 0's host and MASTER_PORT to a port that no other program uses"
        raise NotMet(place, f"{here} {what}", remedy) from None
    except DistNetworkError as error:
        what = "cannot meet itself at" if opens else "cannot join rank 0 at"
        remedy = "set MASTER_ADDR to an address of rank 0's host that all hosts can reach"
        raise NotMet(place, f"{what} {here} ({first_line(error)})", remedy) from None
    return Exchange(place, store, timeout)


class Exchange:
    """Gathers values on rank 0, and broadcasts values from it.

    Args:
        place: Who this rank is.
        store: Holds the values.
        timeout: Seconds that one wait may take.
    """

    def __init__(self, place: Place, store: Store, timeout: float) -> None:
        self.place = place
        self._timeout = timeout
        self._server = store  # rank 0's lives as long as this
        self._store = PrefixStore(f"lisa-ds-check/{place.attempt}", store)

    def prefixed(self, prefix: str) -> Store:
        """A store for a process group, beside what the check itself says."""
        return PrefixStore(prefix, self._store)

    def gather(self, name: str, mine: Any, ranks: Iterable[int], grace: float = GRACE_S) -> dict[int, Any]:
        """Leave this rank's answer, and on rank 0 wait for those of ``ranks``.

        Returns:
            On rank 0 the answers that came in time, by rank; elsewhere nothing.
        """
        self._put(f"{name}/{self.place.rank}", mine)
        if self.place.rank != 0:
            return {}
        deadline = time.monotonic() + self._timeout + grace
        answers = {}
        for rank in ranks:
            value = self._take(f"{name}/{rank}", deadline - time.monotonic())
            if value is not None:
                answers[rank] = json.loads(value)
        return answers

    def tell(self, name: str, value: Any = None) -> Any:
        """Broadcast a value from rank 0; all ranks return it.

        Raises:
            ClusterError: Rank 0 says nothing for longer than it may wait itself.
        """
        if self.place.rank == 0:
            self._put(name, value)
            return value
        # Rank 0 may have waited all its time for somebody else, more than once, before it speaks again.
        told = self._take(name, 3 * self._timeout + 10)
        if told is None:
            raise ClusterError(f"{self.place.who}: rank 0 at {self.place.address} has stopped answering, at {name!r}")
        return json.loads(told)

    def serve_clock(self, ranks: Iterable[int]) -> None:
        """On rank 0: answer each request of ``ranks`` for the time."""
        deadline = time.monotonic() + self._timeout
        for rank in ranks:
            for sample in range(CLOCK_SAMPLES):
                if self._take(f"clock/{rank}/{sample}/asked", deadline - time.monotonic()) is None:
                    break
                self._put(f"clock/{rank}/{sample}/told", time.time())

    def ask_clock(self) -> tuple[float, float] | None:
        """On another rank: how far this host's clock is ahead of rank 0's, and how far off that may be, in seconds.

        As NTP does: rank 0's time lies between question and answer, and of several the quickest answer says most.
        None without an answer.
        """
        best: tuple[float, float] | None = None
        for sample in range(CLOCK_SAMPLES):
            name = f"clock/{self.place.rank}/{sample}"
            asked, start = time.time(), time.perf_counter()
            self._put(f"{name}/asked", None)
            told = self._take(f"{name}/told", self._timeout + 5)
            half = (time.perf_counter() - start) / 2
            if told is None:
                break
            if best is None or half < best[1]:
                best = (asked + half - float(told), half)
        return best

    def _put(self, name: str, value: Any) -> None:
        self._store.set(name, json.dumps(value))

    def _take(self, name: str, seconds: float) -> bytes | None:
        seconds = max(0.01, seconds)

        def take() -> bytes | None:
            try:
                self._store.wait([name], timedelta(seconds=seconds))
            except DistStoreError:  # too late
                return None
            value: bytes = self._store.get(name)
            return value

        # When its time is over, the store asks the server to forget the question, and waits for that without an end.
        return within(seconds + 5, take, f"{self.place.who}: rank 0 at {self.place.address} does not answer at all")


def _check_free(place: Place, here: str) -> None:
    """Refuse a port that is taken. Torch does so, too, but with a C++ stack trace."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what = f"another program listens at {here} already"
                raise NotMet(place, what, "set MASTER_PORT (deepspeed: --master_port) to a free port") from None
            raise NotMet(place, f"cannot listen at {here} ({error.strerror})", "set another MASTER_PORT") from None


def _knock(place: Place, here: str, deadline: float) -> None:
    """Wait until rank 0 accepts a plain connection: if that fails, the reason is known."""
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except socket.gaierror:
            reason, remedy = "its name cannot be resolved", "correct MASTER_ADDR, or the hosts file"
        except ConnectionRefusedError:
            reason, remedy = "nobody listens there", "see whether rank 0 has started, and on that host"
        except OSError as error:
            reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            remedy = "open that port between the hosts, or set MASTER_ADDR to an address on a network they share"
        if time.monotonic() > deadline:
            raise NotMet(place, f"cannot reach rank 0 at {here}: {reason}", remedy)
        time.sleep(_RETRY_S)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0].strip() if str(error) else type(error).__name__
