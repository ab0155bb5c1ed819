"""One self-contained HTML page of a run, or of several side by side: no script, and nothing that is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lisa_ds.errors import ConfigError
from lisa_ds.files import whole
from lisa_ds.report import curves, inline, layers, planned, runs
from lisa_ds.report.runs import Run

FILE_NAME = "report.html"
"""Name of the page in the directory that it is of."""

MANY_RUNS = 8
"""Runs of a page above which each has no part of its own; groups of them above which no figure has them side by side."""

_LAYERS_INCHES = 6.6  # width of the figures of layers, which are scrolled sideways on a phone


@dataclass(frozen=True)
class Figure:
    """A figure of the page."""

    title: str
    body: Markup
    wide: bool = False


def write(directories: Sequence[Path], out: Path) -> list[str]:
    """Write the page of runs or of a comparison; it appears whole or not at all.

    Args:
        directories: A run's, several runs', or a comparison's.
        out: The file.

    Returns:
        Notes about what is missing.

    Raises:
        ConfigError: A directory is neither, matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("report: needs matplotlib: pip install 'lisa-ds[plots]'") from None
    with matplotlib.rc_context(curves.STYLE):
        page, notes = _page(directories)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html").render(page={**page, "long_cell": inline.LONG_CELL})
    try:
        with whole(out) as unfinished:
            unfinished.write_text(text, encoding="utf-8", errors="replace")
    except FileExistsError:
        raise ConfigError(f"--out: {out} cannot be written: {out.parent} is a file") from None
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None
    return notes


def _page(directories: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    comparisons = [directory for directory in directories if runs.is_comparison(directory)]
    if comparisons and len(directories) > 1:
        raise ConfigError(f"report: {comparisons[0]}: is a comparison, which has a page of its own; name it alone")
    if comparisons:
        return _comparison(comparisons[0])
    found = runs.load(directories)
    if len(found) == 1:
        name = directories[0].resolve().name
        title = name if found[0].method in name else f"{name}: {found[0].method}"
        return {"title": title, "run": _run(found[0])}, list(found[0].notes)
    return _side_by_side(", ".join(run.label for run in found) if len(found) <= 4 else f"{len(found)} runs", found)


def _comparison(directory: Path) -> tuple[dict[str, Any], list[str]]:
    page, notes = _side_by_side(directory.resolve().name, runs.load(runs.below(directory)))
    own = []
    table = directory / runs.COMPARISON[1]
    try:
        page["told"] = inline.markdown(table.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        own.append(f"There is no table of the comparison: {table.name}: {getattr(error, 'strerror', error)}.")
    for title, path in inline.pictures(directory).items():
        try:
            page["pictures"].append(Figure(title, inline.picture(path), wide=True))
        except OSError as error:
            own.append(f"No figure {path.name}: {error.strerror}.")
    page["notes"] = [*page["notes"], *own]
    return page, [*notes, *own]


def _side_by_side(title: str, found: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    grouped = runs.groups(found)
    few = grouped if len(grouped) <= MANY_RUNS else {}
    drawn = [
        _figure("Loss against optimizer steps", curves.losses(few, "step")),
        _figure("Loss against training time", curves.losses(few, "time")),
        _figure("Tokens a second, all ranks", curves.values(few, "tokens_per_second", "tokens/s")),
        _figure("Time of a step", curves.phases(few)),
        _figure("Live model state", curves.live_state(few)),
    ]
    own = found if len(found) <= MANY_RUNS else []
    notes = [f"{run.label}: {note}" for run in found for note in run.notes]
    many = " Each has a page of its own: lisa-ds report DIR, for a directory of a run." if found and not own else ""
    head = [
        "run",
        "method",
        "held-out loss",
        "steps",
        "tokens/s",
        "training time",
        "memory of a rank",
        "device",
        "state",
    ]
    return {
        "title": title,
        "run": None,
        "what": f"{len(found)} runs.{many}",
        "notes": notes if not own else [],
        "told": None,
        "pictures": [],
        "head": head,
        "rows": [_row(run, name) for name, members in grouped.items() for run in members],
        "figures": [figure for figure in drawn if figure is not None],
        "runs": [(run.label, _run(run)) for run in own],
    }, notes


def _row(run: Run, group: str) -> list[str]:
    before, after = run.losses
    seconds, tokens = (run.log.seconds if run.log is not None else 0.0), run.tokens
    return [
        run.label,
        group,
        "-" if after is None else f"{'-' if before is None else f'{before:.4f}'} → {after:.4f}",
        "-" if run.steps is None else f"{run.steps:,}",
        "-" if not tokens or not seconds else f"{tokens / seconds:,.0f}",
        "-" if not seconds else duration(seconds),
        "-" if run.memory is None else size(run.memory),
        run.device or "-",
        run.state,
    ]


def _run(run: Run) -> dict[str, Any]:
    commit, versions = run.made_by
    one = {run.label: [run]}
    curve: list[tuple[str, Any]] = [
        ("Loss against optimizer steps", curves.losses(one, "step")),
        ("Loss against training time", curves.losses(one, "time")),
        ("Learning rate", curves.values(one, "learning_rate", "learning rate")),
        ("Gradient norm, before clipping", curves.values(one, "grad_norm", "2-norm")),
        ("Tokens a second, all ranks", curves.values(one, "tokens_per_second", "tokens/s")),
    ]
    return {
        "verdict": verdict(run),
        "facts": [
            ("method", run.method),
            ("model", run.model),
            ("data", run.data),
            ("device", run.device or "unknown"),
            ("state", run.state),
            ("directory", str(run.directory)),
            ("commit", commit),
        ],
        "notes": run.notes,
        "curves": [figure for title, drawn in curve if (figure := _figure(title, drawn)) is not None],
        "time": _time(run),
        "memory": _memory(run),
        "layers": _layers(run),
        "samples": run.samples,
        "config": None if run.config is None else yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "versions": sorted(versions.items()),
    }


def verdict(run: Run) -> str:
    """What became of the run, in a sentence."""
    before, after = run.losses
    parts = []
    if after is not None:
        parts.append(f"Held-out loss {'' if before is None else f'{before:.4f} → '}{after:.4f}")
    elif before is not None:
        parts.append(f"Held-out loss {before:.4f} before training")
    if run.steps is not None:
        parts.append(f"{run.steps:,} steps")
    if run.tokens:
        parts.append(f"{round(run.tokens, -len(str(int(run.tokens))) + 3):,.0f} tokens")
    if run.log is not None and run.log.seconds:
        parts.append(f"{duration(run.log.seconds)} of training")
    if run.device is not None:
        parts.append(run.device)
    return ", ".join(parts) + "." if parts else "Nothing was measured yet."


def _time(run: Run) -> dict[str, Any] | None:
    table = run.seconds_by_phase()
    whole = sum(table.values())
    if not whole:
        return None
    unit, scale = ("s", 1.0) if whole >= 1 else ("ms", 1e3)
    rows = [(name, f"{scale * seconds:.4g}", f"{seconds / whole:.1%}") for name, seconds in table.items()]
    figure = _figure("Mean over the run", curves.phases({run.label: [run]}))
    return {
        "figures": [figure] if figure is not None else [],
        "head": ("phase", f"{unit} of a step", "share"),
        "rows": [*rows, ("all", f"{scale * whole:.4g}", "")],
        "note": "Means over the run on rank 0. other is what is neither: reading data, logging, callbacks. Evaluations and checkpoints are not in it.",
    }


def _memory(run: Run) -> dict[str, Any] | None:
    lines, note = planned.compare(run)
    rows = [
        (
            line.part,
            "-" if line.planned is None else size(line.planned),
            "-" if line.measured is None else size(line.measured),
            "" if line.difference is None else f"{line.difference:+.2%}",
        )
        for line in lines
    ]
    return {"head": ("part", "planned", "measured", "difference"), "rows": rows, "note": note} if rows or note else None


def _layers(run: Run) -> list[Figure]:
    history = run.history
    if history is None or not history.recordings:
        return []
    one = {run.label: history}
    norms = layers.weight_norms(one)
    norms.axes[0].set_title("")  # the page has it, and the run's name
    norms.axes[0].get_legend().remove()
    norms.axes[0].get_xticklabels()[0].set_horizontalalignment("right")  # away from the first block's number
    drawn = [("Norm of each layer's weights, mean over training", norms, True)]
    if history.visits() is not None:
        drawn.append(("Intervals in which each block trained", layers.visits(one), True))
        drawn.append(("Which blocks trained, and how probable each was", layers.probabilities(one), False))
    found = []
    for title, figure, follows in drawn:
        figure.set_size_inches(_LAYERS_INCHES, figure.get_figheight())
        found.append(_figure(title, figure, wide=True, follows_theme=follows))
    return [figure for figure in found if figure is not None]


def _figure(title: str, drawn: Any | None, *, wide: bool = False, follows_theme: bool = True) -> Figure | None:
    if drawn is None:
        return None
    body = inline.svg(drawn, title, follows_theme=follows_theme)
    return Figure(title, body if follows_theme else Markup('<div class="on-white">{}</div>').format(body), wide)


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(7.25), duration(75), duration(7322)
        ('7.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in words.

    Example:
        >>> size(512), size(33_554_432), size(1_258_291_200)
        ('512 B', '33.6 MB', '1.26 GB')
    """
    for unit, bytes_of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_of:
            return f"{count / bytes_of:#.3g} {unit}".replace(". ", " ")
    return f"{count:.0f} B"
