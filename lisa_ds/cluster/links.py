"""Whether hosts can reach one another at arbitrary ports: collectives open such ports on every host."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from lisa_ds.cluster.findings import Finding
from lisa_ds.cluster.hosts import Place

NEIGHBOURS = 8
"""How many hosts each host tries, the next ones in the order of ranks; up to nine hosts all try all."""

_CONNECT_S = 5.0


class Listener:
    """An open port on this host, which accepts connections and sends nothing until it is closed."""

    def __init__(self, place: Place) -> None:
        address = _own_address(place)
        # A host whose own name leads to its loopback is found by the others under that name.
        is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        self.address = place.address if is_loopback else address
        self._socket = socket.create_server(("" if is_loopback else address, 0), family=_family(address), backlog=128)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Accept no more connections."""
        self._socket.close()


def unreachable(rank: int, listeners: Mapping[int, tuple[str, int]]) -> dict[int, str]:
    """The open ports that this rank cannot reach, by the rank that opened them, and why."""
    ranks = sorted(listeners)
    at = ranks.index(rank)
    others = [ranks[(at + step) % len(ranks)] for step in range(1, min(len(ranks), NEIGHBOURS + 1))]
    if not others:
        return {}
    with ThreadPoolExecutor(len(others)) as pool:
        reasons = pool.map(lambda other: _try(*listeners[other]), others)
        return {other: reason for other, reason in zip(others, reasons, strict=True) if reason}


def findings(
    hosts: Mapping[int, str], listeners: Mapping[int, tuple[str, int]], lost: Mapping[int, Mapping[int, str]]
) -> list[Finding]:
    """Findings about open ports that ranks could not reach."""
    return [
        Finding(
            hosts[rank],
            f"cannot connect to {hosts[other]} at {listeners[other][0]}:{listeners[other][1]} ({reason})",
            "open all ports between the hosts, and name the right network by GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
        )
        for rank, reasons in lost.items()
        for other, reason in reasons.items()
    ]


def _own_address(place: Place) -> str:
    """This host's address on the way to rank 0, which on rank 0's host is the master's own."""
    family = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((place.address, place.port))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _try(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return ""
