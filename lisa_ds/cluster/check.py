"""A preflight on all ranks of a job: reports everything that would end a run, or slow it down, at once and by host.

Rank 0 asks, all answer through a store (:mod:`lisa_ds.cluster.exchange`), and rank 0 draws the conclusions. A rank that
does not answer in time is reported and no longer asked; checks that need every rank are then skipped.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistNetworkError

from lisa_ds.cluster import facts, links, paths, probes
from lisa_ds.cluster.deadline import TookTooLong, watch, within
from lisa_ds.cluster.exchange import GRACE_S, Exchange, NotMet, first_line, meet
from lisa_ds.cluster.findings import Finding, Report
from lisa_ds.cluster.hosts import Place, expected
from lisa_ds.errors import ClusterError

SKEW_WARNING_S, SKEW_ERROR_S = 1.0, 30.0

_STEPS = 20  # each of which may wait for as long as --timeout, or a little more


@dataclass(frozen=True)
class Options:
    """What is checked, and for how long."""

    targets: paths.Targets
    timeout: float = 20.0
    hostfile: Path | None = None
    as_json: bool = False


def check(place: Place, environ: Mapping[str, str], options: Options) -> int:
    """Check all ranks of a job; every one of them calls this. Rank 0 prints the report.

    Returns:
        0, or 2 if there are errors; the same on every rank.

    Raises:
        ClusterError: This rank could not take part, or was too late.
    """
    names = expected(environ, place.world_size, options.hostfile)
    timer = watch(_STEPS * (options.timeout + 5), place.who)
    try:
        mine = within(options.timeout, lambda: facts.collect(place), f"{place.who}: does not say what it has")
        try:
            exchange = meet(place, options.timeout)
        except NotMet as error:
            if place.rank != 0:
                raise
            Report(place.world_size, [error.finding]).show(as_json=options.as_json)
            return 2
        if place.rank == 0:
            return _Asking(exchange, options, names).run(mine)
        return _answer(exchange, options, mine)
    except DistNetworkError:
        raise ClusterError(
            f"{place.who}: the connection to {place.address}:{place.port} is lost: rank 0 has ended, and its own message or its "
            "launcher's says why"
        ) from None
    finally:
        timer.cancel()


class _Asking:
    """Rank 0's side of the check; :func:`_answer` is the other ranks', in the same order."""

    def __init__(self, exchange: Exchange, options: Options, names: Mapping[int, str]) -> None:
        self._exchange = exchange
        self._options = options
        self._names = dict(names)
        self._place = exchange.place
        self._report = Report(self._place.world_size)
        self._ranks: list[int] = []

    def run(self, mine: facts.Facts) -> int:
        found = self._arrivals(mine)
        leaders = self._plan(found)
        self._clocks(leaders)
        self._folders(leaders)
        self._links(leaders)
        self._speed()
        bad = bool(self._report.errors)
        self._report.show(as_json=self._options.as_json)
        # Only now: a launcher ends all ranks when the first has failed.
        self._exchange.tell("verdict", 2 if bad else 0)
        self._exchange.gather("bye", None, self._ranks)  # the store ends with this process
        return 2 if bad else 0

    def _arrivals(self, mine: facts.Facts) -> dict[int, facts.Facts]:
        told = self._gather("arrival", asdict(mine), range(self._place.world_size), "did not arrive", late=True)
        found = {rank: facts.Facts(**fields) for rank, fields in told.items()}
        self._ranks = list(found)
        for rank, one in found.items():
            self._names[rank] = one.host
        report = self._report
        for rank, one in found.items():
            fields = {key: value for key, value in asdict(one).items() if key not in ("host", "local_rank", "gpu_free")}
            host = report.hosts.setdefault(one.host, {"ranks": [], **fields})
            host["ranks"].append(rank)
        report.add(facts.differences(found))
        report.add(facts.shortages(found))
        return found

    def _plan(self, found: Mapping[int, facts.Facts]) -> dict[int, str]:
        """The first rank of each host speaks for it."""
        leaders: dict[int, str] = {}
        for rank, one in found.items():
            if one.host not in leaders.values():
                leaders[rank] = one.host
        has_gpus = all(one.local_rank < len(one.gpus) for one in found.values())
        self._device = "cuda" if has_gpus else "cpu"
        self._exchange.tell(
            "plan", {"ranks": self._ranks, "leaders": list(leaders), "token": uuid.uuid4().hex, "device": self._device}
        )
        return leaders

    def _clocks(self, leaders: Mapping[int, str]) -> None:
        others = [rank for rank in leaders if rank != 0]
        self._exchange.serve_clock(others)
        for rank, told in self._gather("clock", None, others, "did not tell the time").items():
            if told is None:
                continue
            host, (ahead, off) = leaders[rank], told
            self._report.hosts[host]["clock"] = told
            if abs(ahead) - off > SKEW_WARNING_S:
                what = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {self._place.host}'s"
                is_error = abs(ahead) - off > SKEW_ERROR_S
                self._report.add([Finding(host, what, "start a time service there (chrony, ntpd)", is_error)])

    def _folders(self, leaders: Mapping[int, str]) -> None:
        targets, token = self._options.targets, uuid.uuid4().hex
        lost: dict[str, str] = {}
        tokens = None
        try:
            tokens = within(self._options.timeout, lambda: paths.Tokens(targets.written, token), "no answer")
            lost = tokens.problems
        except TookTooLong as error:
            lost = dict.fromkeys(targets.written, f"the file system gives {error}")
        self._exchange.tell("folders", {"token": token, "lost": lost})
        seen = {}
        for rank, told in self._gather(
            "seen", _look(self._place, self._options, token, lost), leaders, "does not answer about its files"
        ).items():
            if isinstance(told, str):
                self._report.add([Finding(leaders[rank], told, "see which of its file systems hangs")])
            else:
                seen[leaders[rank]] = paths.Seen(**told)
                self._report.hosts[leaders[rank]]["disk_free"] = told["disk_free"]
        if tokens is not None:
            with suppress(TookTooLong):
                within(self._options.timeout, tokens.remove, "")
        self._report.add(paths.findings(targets, seen, lost, self._place.host))
        for name in targets.may_be_elsewhere:
            if all(one.marks[name] == "missing" for one in seen.values()):
                self._report.notes.append(f"{name}: {targets.read[name]} is taken for a name on the hub: not looked at")

    def _links(self, leaders: Mapping[int, str]) -> None:
        with _listening(self._place) as mine:
            listeners = self._gather("door", mine, leaders, "could not listen")
            listeners = {rank: tuple(listener) for rank, listener in listeners.items() if listener is not None}
            self._exchange.tell("doors", listeners)
            tried = self._gather(
                "tried", links.unreachable(0, listeners), listeners, "does not answer about its network"
            )
            self._exchange.tell("tried all")
        lost = {rank: {int(other): why for other, why in reasons.items()} for rank, reasons in tried.items()}
        self._report.add(links.findings(leaders, listeners, lost))
        self._is_linked = not any(lost.values())

    def _speed(self) -> None:
        report, missing = self._report, self._place.world_size - len(self._ranks)
        reason = f"{missing} of {self._place.world_size} ranks are missing" if missing else ""
        reason = reason or ("" if self._is_linked else "hosts cannot connect")
        reason = reason or ("there is one rank" if self._place.world_size == 1 else "")
        self._exchange.tell("speed", {"all_reduce": not reason})
        mine = _measure(self._exchange, self._options, self._device, not reason)
        told = self._gather("measured", mine, self._ranks, "does not answer about its speed")
        local = {rank: one["local"] for rank, one in told.items() if one["local"]}
        report.add(probes.slow_ranks(self._names, local))
        for rank, one in local.items():
            host = report.hosts[self._names[rank]]
            for key in ("copy_gb_per_s", "matmul_tflops"):  # of its slowest rank
                host[key] = min(one[key], host.get(key, one[key]))
        if reason:
            report.notes.append(f"all-reduce was not tried: {reason}")
            return
        report.backend = "nccl" if self._device == "cuda" else "gloo"
        remedy = f"see {report.backend}'s own messages with {'NCCL_DEBUG=INFO' if self._device == 'cuda' else 'TORCH_DISTRIBUTED_DEBUG=INFO'}"
        for rank, one in told.items():
            if one["problem"]:
                report.add([Finding(self._who(rank), f"all-reduce failed: {one['problem']}", remedy)])
        report.all_reduce = told[0]["all_reduce"]
        for size in report.all_reduce:
            if wrong := size.pop("wrong"):
                what = f"an all-reduce of {size['bytes']:.0f} bytes has {wrong:.0f} wrong elements on some rank"
                report.add([Finding("all hosts", what, remedy)])

    def _gather(self, name: str, mine: Any, ranks: Iterable[int], what: str, *, late: bool = False) -> dict[int, Any]:
        """The answers that came; adds an error for each that did not."""
        ranks = list(ranks)
        told = self._exchange.gather(name, mine, ranks, grace=0.0 if late else GRACE_S)
        lost = [rank for rank in ranks if rank not in told]
        remedy = "see whether it has started, and what it says" if late else "see what hangs there"
        self._report.add(
            Finding(self._who(rank), f"{what} within {self._options.timeout:g} s", remedy) for rank in lost
        )
        self._ranks = [rank for rank in self._ranks if rank not in lost]
        return told

    def _who(self, rank: int) -> str:
        return f"{self._names[rank]} (rank {rank})" if rank in self._names else f"rank {rank}"


def _answer(exchange: Exchange, options: Options, mine: facts.Facts) -> int:
    """The side of every other rank, in the order of :class:`_Asking`."""
    place = exchange.place
    exchange.gather("arrival", asdict(mine), [])
    plan = exchange.tell("plan")
    if place.rank not in plan["ranks"]:
        raise ClusterError(
            f"{place.who}: arrived too late; give all ranks more time, --timeout {3 * options.timeout:g}"
        )
    leads = place.rank in plan["leaders"]
    if leads:
        exchange.gather("clock", exchange.ask_clock(), [])
    folders = exchange.tell("folders")
    if leads:
        exchange.gather("seen", _look(place, options, folders["token"], folders["lost"]), [])
    with _listening(place) as listener:
        if leads:
            exchange.gather("door", listener, [])
        listeners = {int(rank): tuple(at) for rank, at in exchange.tell("doors").items()}
        if leads:
            exchange.gather("tried", links.unreachable(place.rank, listeners), [])
        exchange.tell("tried all")
    speed = exchange.tell("speed")
    exchange.gather("measured", _measure(exchange, options, plan["device"], speed["all_reduce"]), [])
    verdict: int = exchange.tell("verdict")
    with suppress(DistNetworkError):  # rank 0 has waited enough
        exchange.gather("bye", None, [])
    return verdict


def _look(place: Place, options: Options, token: str, lost: Mapping[str, str]) -> dict[str, Any] | str:
    """What this host sees in the folders, or that looking took too long."""
    patience = min(paths.PATIENCE_S, options.timeout / 2)
    try:
        return asdict(
            within(options.timeout, lambda: paths.look(options.targets, token, lost, place.rank, patience), "no answer")
        )
    except TookTooLong as error:
        return f"a file system gives {error}"


@contextmanager
def _listening(place: Place) -> Iterator[tuple[str, int] | None]:
    try:
        listener = links.Listener(place)
    except OSError:
        yield None
        return
    try:
        yield listener.address, listener.port
    finally:
        listener.close()


def _measure(exchange: Exchange, options: Options, kind: str, together: bool) -> dict[str, Any]:
    place, timeout = exchange.place, options.timeout
    device = torch.device(kind, place.local_rank) if kind == "cuda" else torch.device(kind)
    answer: dict[str, Any] = {"local": {}, "all_reduce": [], "problem": ""}
    try:
        answer["local"] = within(timeout, lambda: probes.local(device), "its probe does not end")
        if together:
            store = exchange.prefixed("group")
            answer["all_reduce"] = within(
                timeout, lambda: probes.all_reduce(store, place.rank, place.world_size, device, timeout), "no end"
            )
    except (RuntimeError, TookTooLong) as error:
        answer["problem"] = first_line(error)
    return answer
