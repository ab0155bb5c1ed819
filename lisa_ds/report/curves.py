"""Figures of runs from their logs: losses, rates, phases of a step, live state. They are small, to be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lisa_ds.report import style
from lisa_ds.report.runs import Run
from lisa_ds.run_log import Point

_SIZE = (3.6, 2.8)
"""Inches of a figure: small, so that its text stays legible where it is shrunk to the width of a phone."""

STYLE = {
    **{"font.size": 10.5, "axes.titlesize": 10.5, "axes.labelsize": 10.5, "legend.fontsize": 9.5},
    **{"xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "svg.fonttype": "none", "svg.hashsalt": "lisa_ds"},
    "text.parse_math": False,  # names of runs are no formulas
}
"""Of matplotlib, while a figure is made and saved."""

Over = Literal["step", "time"]


def losses(groups: Mapping[str, Sequence[Run]], over: Over) -> Any | None:
    """Training and held-out loss of a run; of several groups of runs the held-out loss alone, where there is one."""
    runs = [run for members in groups.values() for run in members if run.log is not None]
    if len(runs) > 1:
        key = "eval_loss" if any(len(_series(run, "eval_loss")) > 1 for run in runs) else "loss"
        title = "held-out" if key == "eval_loss" else "training"
        return _lines({name: [_series(run, key) for run in members] for name, members in groups.items()}, over,
                      f"{title} (nats/token)", marks=key == "eval_loss")  # fmt: skip
    if not runs:
        return None
    drawn = {"training": [_series(runs[0], "loss")], "held out": [_series(runs[0], "eval_loss")]}
    return _lines(drawn, over, "loss (nats/token)", marks=True)


def values(groups: Mapping[str, Sequence[Run]], key: str, what: str) -> Any | None:
    """What was logged under ``key``, called ``what`` and with its unit."""
    drawn = {name: [_series(run, key) for run in members] for name, members in groups.items()}
    wide = [point.value for series in drawn.values() for points in series for point in points]
    logarithmic = key == "grad_norm" and bool(wide) and min(wide) > 0 and max(wide) / min(wide) >= 20
    return _lines(drawn, "step", what, logarithmic=logarithmic)


def phases(groups: Mapping[str, Sequence[Run]]) -> Any | None:
    """Seconds of a step by phase, a bar for each group: the mean over its runs."""
    tables = {name: _mean([run.seconds_by_phase() for run in members]) for name, members in groups.items()}
    unit, scale = ("s", 1.0) if max((sum(t.values()) for t in tables.values()), default=0) >= 1 else ("ms", 1e3)
    scaled = {name: {part: scale * value for part, value in table.items()} for name, table in tables.items() if table}
    return _bars(scaled, style.PHASES, f"{unit} of a step, on rank 0")


def live_state(groups: Mapping[str, Sequence[Run]]) -> Any | None:
    """Live model state on a rank by kind, a bar for each group: the mean over its runs."""
    tables = {name: _mean([run.live for run in members]) for name, members in groups.items()}
    large = max((sum(table.values()) for table in tables.values()), default=0) >= 1e9
    unit, size = ("GB", 1e9) if large else ("MB", 1e6)
    scaled = {name: {part: value / size for part, value in table.items()} for name, table in tables.items() if table}
    return _bars(scaled, style.PARTS, f"{unit} on a rank, last interval")


def _series(run: Run, key: str) -> list[Point]:
    return run.log.series(key) if run.log is not None else []


def _mean(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    full = [table for table in tables if table]
    parts = dict.fromkeys(part for table in full for part in table)
    return {part: math.fsum(table.get(part, 0.0) for table in full) / len(full) for part in parts}


def _lines(
    drawn: Mapping[str, Sequence[Sequence[Point]]],
    over: Over,
    what: str,
    *,
    marks: bool = False,
    logarithmic: bool = False,
) -> Any | None:
    """A line for each series; those of one name share a colour and an entry of the legend."""
    drawn = {name: [points for points in series if points] for name, series in drawn.items()}
    drawn = {name: series for name, series in drawn.items() if series}
    if not drawn:
        return None
    figure, axes = _figure(_SIZE[1] + (0.2 * len(drawn) if len(drawn) > 2 else 0))
    longest = max(point.seconds for series in drawn.values() for points in series for point in points)
    unit, size = next((u, s) for u, s in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if longest >= 3 * s or s == 1)
    place: Callable[[Point], float] = (lambda p: p.step) if over == "step" else (lambda p: p.seconds / size)
    colours = style.COLOURS_ON_ANY
    for i, (name, series) in enumerate(drawn.items()):
        for points in series:
            few = len(points) <= 12
            axes.plot([place(p) for p in points], [p.value for p in points], color=colours[i % len(colours)],
                      linestyle=style.DASHES[i // len(colours) % len(style.DASHES)], linewidth=1.6,
                      marker="o" if few and (marks or len(points) == 1) else "", markersize=4,
                      label=name if points is series[0] else "_")  # fmt: skip
    axes.set(xlabel="optimizer step" if over == "step" else f"training time ({unit})", ylabel=what)
    if over == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if len(drawn) > 1:
        _legend(figure, axes)
    return figure


def _bars(tables: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], what: str) -> Any | None:
    """Stacked bars from the left, one below the other, with their sums."""
    parts = [part for part in colours if any(table.get(part) for table in tables.values())]
    if not parts:
        return None
    figure, axes = _figure(height=1.3 + 0.42 * len(tables))
    names = list(tables)[::-1]
    left = [0.0] * len(names)
    for part in parts:
        widths = [tables[name].get(part, 0.0) for name in names]
        left = style.stack(axes, left, widths, part.replace("_", " "), colours[part])
    for i, total in enumerate(left):
        axes.annotate(
            f"{total:.3g}" if total < 1000 else f"{total:,.0f}",
            (total, i),
            (3, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(names)), [_wrapped(name) for name in names] if len(names) > 1 else [""] * len(names))
    axes.set(xlabel=what, xlim=(0, 1.18 * max(left)))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    _legend(figure, axes)
    return figure


def _figure(height: float = _SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    style.plain(axes)
    axes.grid(color="#cccccc", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    short = max(map(len, labels)) <= 12
    figure.legend(handles, [_wrapped(label, 40) for label in labels], loc="outside upper left", frameon=False,
                  ncols=min(3, len(labels)) if short else 1, handlelength=1.6, columnspacing=1.2)  # fmt: skip


def _wrapped(name: str, columns: int = 16) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, columns, break_long_words=True)[:3])
