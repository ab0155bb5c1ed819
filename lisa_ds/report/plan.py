"""A memory plan as text, as JSON, and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lisa_ds.errors import ConfigError
from lisa_ds.memory.advice import RESERVE, Change, changes, fewest_ranks, usable
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.forecast import forecast
from lisa_ds.memory.methods import METHODS
from lisa_ds.memory.run_settings import PARTS, Forecast, RunSettings
from lisa_ds.report import style


@dataclass(frozen=True)
class PlanReport:
    """Everything that a report of a plan contains."""

    name: str
    """The model's name."""

    architecture: Architecture
    run: RunSettings
    forecasts: Mapping[str, Forecast]
    """Forecasts by method; the run's own is among them."""

    otherwise: Forecast
    """Forecast of the run's own method with activation checkpointing switched the other way."""

    memory: int | None
    """Bytes of a device, if it is known."""

    advice: list[Change]
    fewest_ranks: int | None

    @property
    def own(self) -> Forecast:
        """Forecast of the run's own method."""
        return self.forecasts[self.run.method]

    @property
    def fits(self) -> bool | None:
        """Whether the run's peak, with the reserve, fits into a device; None where its memory is unknown."""
        return None if self.memory is None else self.own.peak <= usable(self.memory)


def make(name: str, architecture: Architecture, run: RunSettings, memory: int | None) -> PlanReport:
    """Plan a run, and the other methods beside it.

    Raises:
        LisaError: The run's settings do not fit the model.
    """
    forecasts = {run.method: forecast(architecture, run)}
    for method in METHODS:
        if method not in forecasts:
            forecasts[method] = forecast(architecture, replace(run, method=method))
    advice: list[Change] = []
    fewest = None
    if memory is not None:
        if forecasts[run.method].peak > usable(memory):
            advice = changes(architecture, run, memory)
        fewest = fewest_ranks(architecture, run, memory)
    ordered = {method: forecasts[method] for method in METHODS}
    otherwise = forecast(architecture, replace(run, checkpointing=not run.checkpointing))
    return PlanReport(name, architecture, run, ordered, otherwise, memory, advice, fewest)


def lines(report: PlanReport) -> list[str]:
    """The plan as text."""
    architecture, run = report.architecture, report.run
    text = [
        f"{report.name}: {architecture.num_parameters:,} parameters, {architecture.num_layers} layers"
        + (", head tied to the embeddings" if architecture.tied else ""),
        _settings(run, architecture.tied),
        "",
        *_table(report),
        "",
        *_phases(report),
    ]
    text += _activations(report)
    host = [f"{part} {_gb(size)}" for part, size in report.own.host.items()]
    text.append(f"on the host, in GB: {', '.join(host)}")
    notes = [note for method in METHODS.values() for note in method.notes(run)]
    return [*text, *notes, "", *_verdict(report)]


def as_json(report: PlanReport) -> dict[str, Any]:
    """The plan as plain values; bytes are those of one rank."""
    run = asdict(report.run) | {
        **{name: getattr(report.run, name).model_dump(mode="json") for name in ("lisa", "lora", "galore")},
        "gradient_width": report.run.gradient_width,
    }
    return {
        "model": report.name,
        "parameters": report.architecture.num_parameters,
        "layers": report.architecture.num_layers,
        "run": run,
        "methods": {
            method: {"peak": plan.peak, "peak_phase": plan.peak_phase, "phases": plan.phases, "host": plan.host}
            for method, plan in report.forecasts.items()
        },
        "with_checkpointing" if not report.run.checkpointing else "without_checkpointing": {
            "peak": report.otherwise.peak,
            "peak_phase": report.otherwise.peak_phase,
            "phases": report.otherwise.phases,
        },
        "device_memory": report.memory,
        "fits": report.fits,
        "fewest_ranks": report.fewest_ranks,
        "changes": [asdict(change) for change in report.advice],
    }


def figure(report: PlanReport, path: Path) -> None:
    """Stacked bars: the phases of the run, and the peaks of the other methods.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise ConfigError("--figure: needs matplotlib: pip install 'lisa-ds[plots]'") from None
    own = report.own
    bars = [(phase, parts) for phase, parts in own.phases.items()]
    bars += [
        (METHODS[method].title, plan.phases[plan.peak_phase])
        for method, plan in report.forecasts.items()
        if method != report.run.method
    ]
    places = [i + (0.6 if i >= len(own.phases) else 0) for i in range(len(bars))]
    drawing, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    bottoms = [0.0] * len(bars)
    for part in PARTS:
        heights = [parts.get(part, 0) / 1e9 for _, parts in bars]
        if any(heights):
            axes.bar(places, heights, 0.75, bottom=bottoms, label=part, color=style.PARTS[part])
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, total in zip(places, bottoms, strict=True):
        axes.annotate(f"{total:.1f}", (place, total), ha="center", va="bottom", fontsize=9)
    if report.memory is not None:
        axes.axhline(report.memory / 1e9, color="black", linewidth=1, linestyle="--", label="memory of a device")
    axes.set_xticks(places, [name for name, _ in bars])
    axes.axvline(len(own.phases) - 0.2, color="0.6", linewidth=0.8)
    axes.set_ylabel("GB on one rank")
    axes.set_ylim(top=1.08 * max(*bottoms, (report.memory or 0) / 1e9))
    method = METHODS[report.run.method].title
    setting, what = _settings(report.run, report.architecture.tied).split("; ")
    title = f"{report.name}: phases of a {method} run, and the peaks of other methods\n{setting}"
    axes.set_title(title if what == method else f"{title}\n{what}", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    style.plain(axes)
    try:
        drawing.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--figure: {path} cannot be written: {error}") from None
    finally:
        plt.close(drawing)


def too_little_memory(report: PlanReport, device: str) -> str:
    """The message for a run that is refused because it cannot fit."""
    assert report.memory is not None
    text = (
        f"the run needs {_gb(report.own.peak)} GB on a rank ({report.own.peak_phase}), and {device} has "
        f"{_gb(report.memory)} GB, of which {RESERVE:.0%} are kept free."
    )
    return "\n".join([text, *_remedies(report), "To try it all the same: --force"])


def _settings(run: RunSettings, tied: bool) -> str:
    number = {2: "16-bit", 4: "fp32"}[run.width]
    ranks = f"{run.world_size * run.tensor_parallel} ranks" if run.world_size * run.tensor_parallel > 1 else "1 rank"
    split = f" ({run.tensor_parallel}-way tensor parallel)" if run.tensor_parallel > 1 else ""
    checkpointing = "activation checkpointing" if run.checkpointing else "no activation checkpointing"
    rows = f"{run.micro_batch} x {run.sequence} tokens a micro-batch"
    fused = ", head and loss fused by Liger" if run.fused_loss else ""
    return f"{ranks}{split}, {rows}, {number}, {checkpointing}{fused}; {METHODS[run.method].summary(run, tied=tied)}"


def _table(report: PlanReport) -> list[str]:
    rows = [["GB on one rank, at the peak", *(METHODS[method].title for method in report.forecasts)]]
    peaks = [plan.phases[plan.peak_phase] for plan in report.forecasts.values()]
    for part in PARTS:
        if any(part in parts for parts in peaks):
            rows.append([part, *(_gb(parts.get(part, 0)) for parts in peaks)])
    rows.append(["all", *(_gb(plan.peak) for plan in report.forecasts.values())])
    rows.append(["in", *(plan.peak_phase for plan in report.forecasts.values())])
    return _aligned(rows)


def _phases(report: PlanReport) -> list[str]:
    names = list(report.own.phases)
    rows = [["GB on one rank, by phase", *names]]
    rows.append([METHODS[report.run.method].title, *(_gb(sum(report.own.phases[name].values())) for name in names)])
    return _aligned(rows)


def _activations(report: PlanReport) -> list[str]:
    both = {report.run.checkpointing: report.own, not report.run.checkpointing: report.otherwise}
    rows = [["GB on one rank", "activations at most", "peak"]]
    for checkpointing, plan in sorted(both.items()):
        most = max(parts.get("activations", 0) for parts in plan.phases.values())
        rows.append([f"{'with' if checkpointing else 'without'} checkpointing", _gb(most), _gb(plan.peak)])
    return ["", *_aligned(rows), ""]


def _verdict(report: PlanReport) -> list[str]:
    if report.memory is None:
        return ["say --gpu-memory, such as 80GB, to be told whether it fits"]
    room = usable(report.memory) - report.own.peak
    kept = f"{RESERVE:.0%} of {_gb(report.memory)} GB kept free"
    if report.fits:
        return [f"fits, with {_gb(room)} GB to spare ({kept}); fewest ranks it fits on: {report.fewest_ranks}"]
    return [f"does not fit: {_gb(-room)} GB too much ({kept})", *_remedies(report)]


def _remedies(report: PlanReport) -> list[str]:
    assert report.memory is not None
    text = []
    if report.fewest_ranks is not None:
        text.append(f"As it is, it fits on {report.fewest_ranks} ranks.")
    if report.advice:
        text.append("What to change first, each beside those above it:")
        text += [f"  {change.write}  ({change.costs}): {_gb(change.peak)} GB" for change in report.advice]
        if report.advice[-1].peak > usable(report.memory):
            text.append("These do not suffice on as many ranks; add ranks.")
    return text


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
