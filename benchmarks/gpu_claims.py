"""What is claimed of a GPU, and what measurements say of it: held, missed, or not run.

A claim is a record like any other: its value is what was measured, its settings hold the stage, the bound and the verdict.
"""

from __future__ import annotations

import os
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_ds import records


def device_name() -> str:
    """The card's name, from its driver: a process that forks others may not touch CUDA itself."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


@dataclass(frozen=True)
class Claim:
    """One sentence about a GPU, and the bound that decides it."""

    stage: str
    text: str
    bound: str
    holds: Callable[[float], bool]


def at_most(stage: str, text: str, bound: float, unit: str = "") -> Claim:
    """A claim that a number does not exceed ``bound``."""
    return Claim(stage, text, f"<= {bound:g} {unit}".rstrip(), lambda value: value <= bound)


def at_least(stage: str, text: str, bound: float, unit: str = "") -> Claim:
    """A claim that a number is not below ``bound``."""
    return Claim(stage, text, f">= {bound:g} {unit}".rstrip(), lambda value: value >= bound)


class Report:
    """Writes the records of a stage, each at once: what was measured stays when the stage is ended.

    Args:
        path: JSON lines, appended to.
        stage: Its letter.
        dry_run: Whether numbers mean nothing: claims are then written as ``dry run``.
    """

    def __init__(self, path: Path, stage: str, *, dry_run: bool) -> None:
        self.path, self.dry_run, self._stage = path, dry_run, stage
        self.commit: str = os.environ.get("LISA_DS_COMMIT") or records.commit()
        self._common: dict[str, Any] = {
            "device": "CPU, dry run" if dry_run else device_name(),
            "commit": self.commit,
            "versions": records.versions(),
        }

    def write(
        self, name: str, variant: str, value: float, unit: str, samples: Sequence[float] = (), **settings: Any
    ) -> None:
        """One record; with ``samples``, their median and spread in place of ``value``."""
        low = high = None
        number = 1
        if samples:
            spread = records.spread(samples)
            value, low, high, number = spread.value, spread.low, spread.high, spread.n
        record = records.Record(
            name=name, variant=variant, value=value, unit=unit, low=low, high=high, n=number,
            settings={"stage": self._stage, **settings}, **self._common,
        )  # fmt: skip
        records.append(self.path, record)
        print(f"  {name:28} {variant:44} {value:.6g} {unit}", flush=True)

    def judge(self, claim: Claim, value: float, unit: str = "", **settings: Any) -> None:
        """The verdict on a claim, from what was measured."""
        verdict = "dry run" if self.dry_run else "held" if claim.holds(value) else "missed"
        self.write("claim", claim.text, value, unit, bound=claim.bound, verdict=verdict, **settings)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part of a stage: its failure is told and recorded, and the next one runs."""
        print(f"{self._stage}: {name}", flush=True)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.write("failed", name, 1, "failure", error=f"{type(error).__name__}: {error}"[:500])


def table(claims: Sequence[Claim], found: Sequence[records.Record]) -> list[str]:
    """A line of Markdown for every claim, with what became of it."""
    judged = {record.variant: record for record in found if record.name == "claim"}
    lines = ["| | claim | bound | measured | |", "|---|---|---|---|---|"]
    for claim in claims:
        record = judged.get(claim.text)
        value = f"{record.value:.4g} {record.unit}".rstrip() if record else ""
        verdict = record.settings["verdict"] if record else "not run"
        lines.append(f"| {claim.stage} | {claim.text} | {claim.bound} | {value} | {verdict} |")
    return lines
