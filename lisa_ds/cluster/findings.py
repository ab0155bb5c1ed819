"""What a check has found, and the report of it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

HOSTS_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be."""

    host: str
    """Where: ``gpu7``, or ``gpu7 (rank 3)`` if it is one rank's."""

    what: str
    remedy: str
    is_error: bool = True
    """Whether a run would fail; otherwise it is a warning."""

    def __str__(self) -> str:
        """``gpu7: what; remedy``."""
        return f"{self.host}: {self.what}; {self.remedy}"


@dataclass
class Report:
    """The result of a check, on rank 0."""

    world_size: int
    findings: list[Finding] = field(default_factory=list)
    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each host has and measured, by name."""

    all_reduce: list[dict[str, float]] = field(default_factory=list)
    """For each size: ``bytes, seconds, algorithm_gb_per_s, bus_gb_per_s``."""

    backend: str = ""
    notes: list[str] = field(default_factory=list)
    """What was not checked, and why."""

    @property
    def errors(self) -> list[Finding]:
        """Findings that would make a run fail."""
        return [finding for finding in self.findings if finding.is_error]

    @property
    def warnings(self) -> list[Finding]:
        """Findings that may slow a run down or harm it."""
        return [finding for finding in self.findings if not finding.is_error]

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings, each once: ranks of one host find the same."""
        self.findings += [finding for finding in dict.fromkeys(findings) if finding not in self.findings]

    def as_dict(self) -> dict[str, Any]:
        """The whole of it, for JSON."""
        return {
            "ok": not self.errors,
            "world_size": self.world_size,
            "errors": [_finding(finding) for finding in self.errors],
            "warnings": [_finding(finding) for finding in self.warnings],
            "notes": self.notes,
            "backend": self.backend,
            "all_reduce": self.all_reduce,
            "hosts": self.hosts,
        }

    def lines(self) -> list[str]:
        """Everything but the errors, as text."""
        rows: list[tuple[str, ...]] = [("host", "ranks", "GPUs", "memory free", "disk free", "clock", "copy", "matmul")]
        rows += [_row(name, host) for name, host in self.hosts.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        versions = {line for host in self.hosts.values() for line in host["versions"].items()}
        if len({name for name, _ in versions}) == len(versions):
            lines.append("on all: " + ", ".join(f"{name} {version}" for name, version in sorted(versions)))
        if self.all_reduce:
            sizes = ", ".join(
                f"{_bytes(size['bytes'])} {size['algorithm_gb_per_s']:.3g} GB/s" for size in self.all_reduce
            )
            lines.append(f"all-reduce of {self.world_size} ranks by {self.backend} (bytes / time): {sizes}")
        lines += [f"note: {note}" for note in self.notes]
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def show(self, *, as_json: bool) -> None:
        """Print it: the errors on stderr, everything else on stdout."""
        print(json.dumps(self.as_dict()) if as_json else "\n".join(self.lines()), flush=True)
        ranks = _count(self.world_size, "rank")
        if self.errors:
            first = f"lisa-ds: error: {_count(len(self.errors), 'error')} on {ranks}"
            print(first, *self.errors, sep="\n", file=sys.stderr, flush=True)
        elif not as_json:
            print(f"ok: {ranks} on {_count(len(self.hosts), 'host')}", flush=True)


def odd_ones(values: Mapping[str, Any], what: str, remedy: str) -> list[Finding]:
    """A finding for each host that differs from most of the others (from the first, if there are as many of each).

    Args:
        values: By host.
        what: What they are values of.
        remedy: What to do about it.
    """
    counts = Counter(map(repr, values.values()))
    first = next(iter(values.values()), None)
    usual = max(values.values(), key=lambda value: (counts[repr(value)], value == first), default=None)
    agreeing = named([host for host, value in values.items() if value == usual])
    return [
        Finding(host, f"{what} is {value or 'absent'}, but {usual or 'absent'} on {agreeing}", remedy)
        for host, value in values.items()
        if value != usual
    ]


def named(hosts: Collection[str]) -> str:
    """The first few, and how many more: ``gpu1, gpu2, gpu3, gpu4 and 60 more``."""
    shown = ", ".join(list(hosts)[:HOSTS_NAMED])
    return f"{shown} and {len(hosts) - HOSTS_NAMED} more" if len(hosts) > HOSTS_NAMED else shown


def _finding(finding: Finding) -> dict[str, Any]:
    fields = asdict(finding)
    del fields["is_error"]
    return fields


def _row(name: str, host: Mapping[str, Any]) -> tuple[str, ...]:
    gpus = Counter(host["gpus"])
    clock = host.get("clock")
    return (
        name,
        _ranges(host["ranks"]),
        ", ".join(f"{count} x {gpu}" for gpu, count in gpus.items()) or "none",
        f"{_gb(host['memory_free'])} of {_gb(host['memory'])} GB",
        ", ".join(f"{folder} {_gb(free)} GB" for folder, free in host.get("disk_free", {}).items()) or "-",
        "-" if clock is None else f"{clock[0] * 1e3:+.1f} ± {clock[1] * 1e3:.1f} ms",
        f"{host['copy_gb_per_s']:.1f} GB/s" if "copy_gb_per_s" in host else "-",
        f"{host['matmul_tflops']:.3g} TFLOP/s" if "matmul_tflops" in host else "-",
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _ranges(ranks: list[int]) -> str:
    if len(ranks) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g}" if size < 100e9 else f"{size / 1e9:.0f}"


def _bytes(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
