"""Reports layer statistics of runs: the paper's figure of mean weight norms, visits, probabilities, and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lisa_ds.errors import ConfigError, DataError
from lisa_ds.report import style
from lisa_ds.sampling import statistics
from lisa_ds.sampling.statistics import History

_WIDE_RATIO = 8  # of the largest norm to the smallest, from which a logarithmic axis shows more
_MANY_CELLS = 1500  # of a heat map, from which the dots in its cells are smaller ...
_MANY_DOTS = 2000  # ... and above which they would hide it


def load(paths: Sequence[str | Path]) -> dict[str, History]:
    """The histories of runs, each under a label that is unique among them.

    Raises:
        DataError: A file is missing or malformed, or holds no recording yet.
    """
    histories = [statistics.read(path) for path in paths]
    for history in histories:
        if not history.recordings:
            raise DataError(f"{history.path}: holds no recording yet; a run makes its first at the end of an interval")
    return dict(zip(_labels(histories), histories, strict=True))


def lines(histories: dict[str, History]) -> list[str]:
    """The table: for each unit the mean weight norm, the last gradient and update norms, and the visits, run by run."""
    text = []
    for label, history in histories.items():
        last = history.recordings[-1]
        drawn = f", {last.interval + 1} intervals" if history.visits() is not None else ""
        text.append(
            f"{label}: {history.start.method} of {history.start.model}, {last.step} steps, "
            f"{len(history.recordings)} recordings{drawn}"
        )
    labels, names = [""], ["unit"]
    for label, history in histories.items():
        columns = ["mean weight", "gradient", "update", *(["visits"] if history.visits() is not None else [])]
        labels += [label, *[""] * (len(columns) - 1)]
        names += columns
    rows = [labels, names]
    for unit in _units(histories):
        row = [_unit_name(unit, histories)]
        for history in histories.values():
            row += _cells(unit, history)
        rows.append(row)
    return [*text, "", *_aligned(rows)]


def draw(histories: dict[str, History], directory: Path, kind: str = "png") -> list[Path]:
    """Write the figures for which there is data, and return their files.

    Args:
        histories: From :func:`load`.
        directory: Where to write; made if need be.
        kind: ``png`` or ``svg``.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("report layers --out: needs matplotlib: pip install 'lisa-ds[plots]'") from None
    figures = {"weight_norms": weight_norms(histories)}
    drawn = {label: history for label, history in histories.items() if history.visits() is not None}
    if drawn:
        figures |= {"visits": visits(drawn), "probabilities": probabilities(drawn)}
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lisa_ds"}):
            for name, figure in figures.items():
                path = directory / f"{name}.{kind}"
                figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
    except OSError as error:
        raise ConfigError(f"--out: {directory} cannot be written: {error.strerror}") from None
    return written


def weight_norms(histories: dict[str, History]) -> Any:
    """Mean weight norm by layer, a line for each run: embeddings, blocks from first to last, head."""
    blocks = _most_blocks(histories)
    figure, axes = _figure(blocks, height=4.6)
    gap = max(1.5, blocks / 20)  # the ends have names, not numbers
    largest, smallest = 0.0, math.inf
    for i, (label, history) in enumerate(histories.items()):
        means = history.mean_weight_norm()
        places = {"embeddings": -gap, "lm_head": blocks - 1 + gap, **{unit: int(unit) for unit in history.start.blocks}}
        points = sorted((places[unit], norm) for unit, norm in means.items() if unit in places)
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        largest, smallest = max(largest, *ys), min(smallest, *ys)
        axes.plot(xs, ys, label=label, **{**style.line(i), "markersize": 5 if blocks <= 40 else 3.5})
    if smallest > 0 and largest / smallest >= _WIDE_RATIO:
        axes.set_yscale("log")
        for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_ticks(_plain_number)
        axes.grid(axis="y", which="minor", color="0.95")
    tied = all(history.start.tied for history in histories.values())
    _name_layers(axes, blocks, gap, "embed\n= head" if tied else "embed", None if tied else "head")
    axes.set(ylabel="mean weight norm (2-norm, mean over recordings)", title="Weight norm by layer, mean over training")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def visits(histories: dict[str, History]) -> Any:
    """The number of intervals in which each block trained, a panel for each run, with its expected value."""
    figure, panels = _panels(histories, height=2.5)
    for i, (panel, (label, history)) in enumerate(zip(panels, histories.items(), strict=True)):
        counts = list((history.visits() or {}).values())
        blocks = range(len(counts))
        panel.bar(blocks, counts, 0.8, color=style.line(i)["color"])
        expected = _expected_visits(history)
        if expected is not None:
            panel.step([b - 0.5 for b in blocks] + [len(counts) - 0.5], [*expected, expected[-1]], where="post",
                       color="black", linewidth=1.2, label="expected")  # fmt: skip
            panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
        intervals = history.recordings[-1].interval + 1
        panel.set_title(f"{label}: {intervals} intervals", loc="left", fontsize=10)
        panel.set(ylabel="intervals trained", xlim=(-0.7, len(counts) - 0.3))
        panel.set_ylim(0, max(1.0, 1.08 * max([*counts, *(expected or [])])))
        panel.yaxis.get_major_locator().set_params(integer=True)
        _number_blocks(panel, len(counts))
    panels[-1].set_xlabel("block")
    return figure


def probabilities(histories: dict[str, History]) -> Any:
    """Each block's probability to be drawn, over the intervals, a panel for each run; dots mark those that were drawn.

    Without recorded probabilities they are 1 for blocks that trained and 0 for the rest.
    """
    figure, panels = _panels(histories, height=4.4 if _most_blocks(histories) > 40 else 3.4)
    chances = [p for history in histories.values() for line in history.recordings for p in line.probabilities or ()]
    # One scale for all panels; where all are alike, in its middle.
    highest = min(
        1.0, 2 * max(chances) if chances and max(chances) - min(chances) < 1e-9 else max(chances, default=1.0)
    )
    for panel, (label, history) in zip(panels, histories.items(), strict=True):
        by_interval = {line.interval: line for line in history.recordings}
        first, last = min(by_interval), max(by_interval)
        blocks = len(history.start.blocks)
        told = any(line.probabilities is not None for line in by_interval.values())
        grid = [[math.nan] * (last - first + 1) for _ in range(blocks)]
        trained = []
        for interval, line in by_interval.items():
            for block in range(blocks):
                is_trained = str(block) in line.sampled
                if told and line.probabilities is not None:
                    grid[block][interval - first] = line.probabilities[block]
                elif not told:
                    grid[block][interval - first] = float(is_trained)
                if is_trained:
                    trained.append((interval, block))
        image = panel.imshow(grid, aspect="auto", origin="lower", cmap="cividis", vmin=0.0, vmax=(highest or 1.0) if told else 1.0,
                             extent=(first - 0.5, last + 0.5, -0.5, blocks - 0.5), interpolation="nearest")  # fmt: skip
        figure.colorbar(image, ax=panel, label="probability" if told else "trained", pad=0.015)
        if told and 0 < len(trained) <= _MANY_DOTS:
            size = 9 if blocks * (last - first + 1) <= _MANY_CELLS else 5
            panel.scatter(*zip(*trained, strict=True), s=size, color="white", edgecolors="black", linewidths=0.5)
            what = "probability of each block; dots: trained"
        else:
            what = "probability of each block" if told else "blocks that trained"
        panel.set_title(f"{label}: {what}", loc="left", fontsize=10)
        panel.set_ylabel("block")
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("interval")
    return figure


def _expected_visits(history: History) -> list[float] | None:
    """Sums of the probabilities of every interval; None if one is missing."""
    by_interval = {line.interval: line.probabilities for line in history.recordings}
    told = [chances for chances in by_interval.values() if chances is not None]
    if len(told) < history.recordings[-1].interval + 1:
        return None
    return [math.fsum(column) for column in zip(*told, strict=True)]


def _most_blocks(histories: dict[str, History]) -> int:
    return max(len(history.start.blocks) for history in histories.values())


def _plain_number(value: float, position: int) -> str:
    """Label of a tick on a logarithmic axis: 200 and not 2 x 10^2; not all minor ticks have one."""
    leading = f"{value:.0e}"[0]
    return f"{value:g}" if leading in "1235" else ""


def _figure(blocks: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(14.0, 7.0 + blocks / 16), height), layout="constrained")
    axes = figure.subplots()
    style.plain(axes)
    return figure, axes


def _panels(histories: dict[str, History], height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    blocks = _most_blocks(histories)
    size = (min(14.0, 7.0 + blocks / 16), height * len(histories) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(histories), 1, squeeze=False)[:, 0]
    for panel in panels:
        style.plain(panel)
    return figure, list(panels)


def _name_layers(axes: Any, blocks: int, gap: float, first: str, last: str | None) -> None:
    shown = range(0, blocks, _stride(blocks))
    ends = [blocks - 1 + gap] if last else []
    axes.set_xticks([-gap, *shown, *ends], [first, *map(str, shown), *([last] if last else [])])
    axes.set_xlim(-gap - 0.8, blocks - 0.2 + (gap if last else 0))
    axes.set_xlabel("layer: embedding, blocks by number, head" if last else "layer: embedding, blocks by number")


def _number_blocks(axes: Any, blocks: int) -> None:
    axes.set_xticks(range(0, blocks, _stride(blocks)))


def _stride(blocks: int) -> int:
    """Blocks between two numbers on an axis: at most about sixteen of them."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if blocks / step <= 16)


def _labels(histories: Sequence[History]) -> list[str]:
    """A label for each run: its method, and as much of its path as makes it unique."""
    places = [
        history.path.absolute().parent if history.path.name == statistics.FILE_NAME else history.path
        for history in histories
    ]
    for depth in range(1, 1 + max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(set(places)):
            break
    labels = [
        name if history.start.method in name else f"{name} ({history.start.method})"
        for name, history in zip(names, histories, strict=True)
    ]
    return [label if labels.count(label) == 1 else f"{label} [{i}]" for i, label in enumerate(labels, start=1)]


def _units(histories: dict[str, History]) -> list[str]:
    known = {unit for history in histories.values() for unit in history.start.units}
    blocks = sorted((unit for unit in known if unit.isdecimal()), key=int)
    return [unit for unit in ("embeddings", *blocks, "block_rest", "adapters", "lm_head", "rest") if unit in known]


def _unit_name(unit: str, histories: dict[str, History]) -> str:
    tied = unit == "embeddings" and all(history.start.tied for history in histories.values())
    return "embeddings = lm_head" if tied else unit


def _cells(unit: str, history: History) -> list[str]:
    mean = history.mean_weight_norm().get(unit)
    last = [
        next(
            (norm for line in reversed(history.recordings) if (norm := getattr(line, name).get(unit)) is not None), None
        )
        for name in ("gradient_norm", "update_norm")
    ]
    cells = [_number(value) for value in (mean, *last)]
    counts = history.visits()
    if counts is not None:
        cells.append(str(counts.get(unit, "-")))
    return cells


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _aligned(rows: list[list[str]]) -> list[str]:
    # A run's label stands over its columns and may be longer than the first of them.
    widths = [max(len(row[i]) for row in rows[1:]) for i in range(len(rows[1]))]
    text = []
    head, over = rows[0], ""
    for i, cell in enumerate(head):
        begin = sum(width + 2 for width in widths[:i])
        if cell:
            over = over.ljust(begin) + ("" if len(over) <= begin else "  ") + cell
    text.append(over.rstrip())
    for row in rows[1:]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    return text
