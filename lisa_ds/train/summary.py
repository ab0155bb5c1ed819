"""The summary of a finished run, on the console and as records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisa_ds import records
from lisa_ds.integrations.throughput import UNITS
from lisa_ds.memory import SAMPLED_KINDS


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of a finished run. Bytes are those of one rank."""

    method: str
    steps: int
    """Steps of the trainer, each with rows of its own, those before a resume included."""

    skipped_steps: int
    """How many of those changed no weight, as their gradients were not finite."""

    loss_before: float | None
    """Held-out loss before the first step; None without held-out data."""

    loss_after: float | None
    live: Mapping[str, int]
    """Bytes of live model state in the last interval, by kind."""

    full: Mapping[str, int]
    """Bytes that full fine-tuning would keep, according to the planner."""

    num_layers: int
    """Blocks, or whatever is drawn."""

    layers_visited: tuple[int, ...]
    """Those that have trained."""

    num_intervals: int
    tokens: int
    """Tokens trained on by all ranks since the start or resume, padding not counted."""

    seconds: float
    """Seconds of training, waiting for data included, evaluations and checkpoints not."""

    world_size: int
    device: str
    model: Path
    """Where the exported model is."""

    throughput: Mapping[str, float] = field(default_factory=dict)
    """Throughput since the start or resume, under the keys of log entries."""

    drawn: str = "layers"
    """What is drawn: ``layers`` or ``matrices``."""

    rows_without_labels: int = 0
    """Rows of all ranks without any label, since the start or resume."""

    def lines(self) -> list[str]:
        """The summary as text."""
        live, full = (sum(table[kind] for kind in SAMPLED_KINDS) for table in (self.live, self.full))
        kinds = ", ".join(f"{kind} {self.live[kind] / 1e6:.1f}" for kind in SAMPLED_KINDS)
        lines = [] if self.loss_before is None else [f"held-out loss {self.loss_before:.4f} -> {self.loss_after:.4f}"]
        lines.append(f"steps: {self.steps}, all applied" if not self.skipped_steps else self._skipped())
        if self.rows_without_labels:
            lines.append(f"rows without labels: {self.rows_without_labels:,}; nothing was learned from them")
        lines.append(f"live state {live / 1e6:.1f} MB on each of {self.world_size} ranks ({kinds})")
        if self.method == "lisa":
            lines.append(f"full fine-tuning would hold {full / 1e6:.1f} MB, {full / live:.1f} times as much")
            lines.append(
                f"{self.drawn} visited: {len(self.layers_visited)} of {self.num_layers} in {self.num_intervals} intervals"
                + (f", {list(self.layers_visited)}" if self.drawn == "layers" else "")
            )
        if self.tokens:
            waiting = self.throughput.get("waiting_for_data", 0.0)
            lines.append(
                f"tokens/s: {self.tokens / self.seconds:.0f} ({self.tokens:,} tokens in {self.seconds:.0f} s of training, "
                f"{waiting:.0%} of it waiting for data)"
            )
        if apart := self.throughput.get("evaluating_and_saving_s"):
            lines.append(f"evaluations and checkpoints: {apart:.0f} s more")
        if self.throughput:
            shares = [f"{key.upper()} {self.throughput[key]:.1%}" for key in ("mfu", "hfu") if key in self.throughput]
            memory = f"at most {self.throughput['max_rank_memory_gb']:.2f} GB"
            rate = self.throughput.get("tokens_per_second_per_gpu", 0.0)
            rates = [f"{rate:.0f} tokens a second"] if self.tokens else []
            lines.append("on each rank: " + ", ".join([*rates, *shares, memory]))
        return [*lines, f"model: {self.model}"]

    def _skipped(self) -> str:
        applied = self.steps - self.skipped_steps
        return f"steps: {self.steps}, {applied} applied and {self.skipped_steps} skipped, as their gradients were not finite"

    def write(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Append the summary to a file of records."""
        values: list[tuple[str, str, float | None, str, float | None]] = [
            ("held_out_loss", self.method, self.loss_before, "nats", 0),
            ("held_out_loss", self.method, self.loss_after, "nats", self.steps),
            *((f"live_bytes/{kind}", self.method, size, "B", None) for kind, size in self.live.items()),
            *((f"live_bytes/{kind}", "full, planned", size, "B", None) for kind, size in self.full.items()),
            ("applied_steps", self.method, self.steps - self.skipped_steps, "steps", None),
            ("skipped_steps", self.method, self.skipped_steps, "steps", None),
            ("rows_without_labels", self.method, self.rows_without_labels, "rows", None),
            ("tokens_per_second", self.method, self.tokens / self.seconds if self.tokens else None, "1/s", None),
            *(
                (key, self.method, value, UNITS[key], None)
                for key, value in self.throughput.items()
                if key != "tokens_per_second"
            ),
            ("layers_visited", self.method, len(self.layers_visited), "layers", None),
        ]
        commit, versions = records.commit(), records.versions()
        for name, variant, value, unit, step in values:
            if value is None or not math.isfinite(value):  # a run that diverged: JSON has no word for it
                continue
            records.append(
                path,
                records.Record(
                    name=name,
                    variant=variant,
                    value=value,
                    unit=unit,
                    device=self.device,
                    commit=commit,
                    versions=versions,
                    x=step,
                    x_label="" if step is None else "step",
                    settings=dict(settings),
                ),
            )
