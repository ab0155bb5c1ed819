"""Figures of a comparison: held-out loss against steps, seconds and memory; where bytes and seconds go; layers and intervals swept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lisa_ds.errors import ConfigError
from lisa_ds.memory import PARTS_OF_STATE
from lisa_ds.report import style
from lisa_ds.report.comparison.read import PEAK, Comparison, Run, mean

_SWEPT = ("num_sampled_layers", "interval_steps")


def draw(found: Comparison, directory: Path) -> tuple[list[Path], list[str]]:
    """Write the figures for which there are numbers.

    Args:
        found: The comparison.
        directory: Where to write; made if need be.

    Returns:
        The files, and what was left out, a line each.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("compare: figures need matplotlib: pip install 'lisa-ds[plots]'")
    written, left_out = [], []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (make, needs) in FIGURES.items():
            if (figure := make(found)) is None:
                left_out += [f"no figure of {name}: {needs}"]
                continue
            path = directory / f"comparison-{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    except OSError as error:
        raise ConfigError(f"--out: {directory} cannot be written: {error.strerror}") from None
    return written, left_out


def loss(found: Comparison) -> Any:
    """Held-out loss against steps, seconds of training and peak memory: the mean over seeds, and each seed at the end."""
    arms = [arm for arm in found.arms if found.losses(arm)]
    if not arms:
        return None
    timed = all(run.values.get("training_seconds") is not None for arm in arms for run in found.of(arm))
    figure, panels = _panels(3 if timed else 2, width=4.9)
    for arm in arms:
        own = style.line(found.arms.index(arm))
        runs = [run for run in found.of(arm) if run.loss is not None]
        points = _mean_curve(runs)
        panels[0].plot([p[0] for p in points], [p[2] for p in points], label=arm, **own)
        panels[0].plot([run.steps for run in runs], [run.loss for run in runs], "_", color=own["color"], markersize=9)
        if timed:
            panels[1].plot([p[1] for p in points], [p[2] for p in points], **own)
            ends = [run.values["training_seconds"] for run in runs]
            panels[1].plot(ends, [run.loss for run in runs], "_", color=own["color"], markersize=9)
        peak, end = mean(run.values.get(PEAK) for run in runs), mean(run.loss for run in runs)
        if peak is not None:
            dots = {**own, "linestyle": "none", "markersize": 8}
            panels[-1].plot(
                [run.values[PEAK] for run in runs], [run.loss for run in runs], "_", color=own["color"], markersize=9
            )
            panels[-1].plot(peak, end, **dots)
    panels[0].set(xlabel="optimizer steps", ylabel="held-out loss (nats per token)")
    if timed:
        panels[1].set_xlabel("seconds of training")
        panels[1].sharey(panels[0])
    panels[-1].set(xlabel="peak memory of a rank (GB)", ylabel="held-out loss after training")
    for panel in panels[:-1]:
        panel.set_xlim(left=0)
    figure.suptitle(
        f"Held-out loss on the verdict's rows: mean of the seeds, a bar for each seed at the end\n{_what(found)}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=min(4, len(arms)), frameon=False)
    return figure


def memory(found: Comparison) -> Any:
    """Bytes of a rank by part, stacked, for each arm: live state, and what the peak has beside it."""
    arms = [arm for arm in found.arms if any(run.state is not None for run in found.of(arm))]
    if not arms:
        return None
    figure, axes = _bars(len(arms))
    left = [0.0] * len(arms)
    for part, kinds in PARTS_OF_STATE.items():
        sizes = [sum(found.mean(arm, f"live_bytes/{kind}") or 0.0 for kind in kinds) / 1e9 for arm in arms]
        left = style.stack(axes, left, sizes, "fp32 weights" if part == "master" else part, style.PARTS[part])
    peaks = [found.mean(arm, PEAK) or 0.0 for arm in arms]
    on_cpu = any("CPU" in device for device in found.devices)
    what = "activations, temporary buffers, Python and libraries" if on_cpu else "activations and temporary buffers"
    style.stack(
        axes,
        left,
        [max(0.0, peak - at) for peak, at in zip(peaks, left, strict=True)],
        what,
        style.PARTS["activations"],
    )
    for i, (peak, arm) in enumerate(zip(peaks, arms, strict=True)):
        axes.annotate(f"{peak:.2f}", (peak, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=9)
        planned = found.planned.get(arm, {}).get("peak")
        if planned is not None:
            axes.plot([planned / 1e9] * 2, [i - 0.4, i + 0.4], color="black", linewidth=1.2, linestyle=":",
                      label="" if i else "planned peak")  # fmt: skip
    return _finish_bars(figure, axes, arms, "GB on one rank, at the peak", f"Memory of a rank by part\n{_what(found)}")


def times(found: Comparison) -> Any:
    """Seconds of a step by part, stacked, for each arm."""
    arms = [arm for arm in found.arms if found.mean(arm, "seconds_per_step/forward") is not None]
    if not arms:
        return None
    figure, axes = _bars(len(arms))
    left = [0.0] * len(arms)
    *phases, other = style.PHASES.items()
    for part, colour in phases:
        left = style.stack(
            axes, left, [found.mean(arm, f"seconds_per_step/{part}") or 0.0 for arm in arms], part, colour
        )
    whole = [mean(run.seconds_per_step for run in found.of(arm)) for arm in arms]
    if None not in whole:
        rest = [max(0.0, (all_of_it or 0.0) - at) for all_of_it, at in zip(whole, left, strict=True)]
        left = style.stack(axes, left, rest, "the rest (data, callbacks, waiting)", other[1])
    for i, total in enumerate(left):
        axes.annotate(f"{total:.3g}", (total, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=9)
    return _finish_bars(figure, axes, arms, "seconds per optimizer step", f"Time of a step by part\n{_what(found)}")


def sweep(found: Comparison) -> Any:
    """Held-out loss against the length of an interval, a line for each number of sampled layers, of arms that differ in these alone."""
    points = {arm: swept for arm in found.arms if found.losses(arm) and (swept := _swept(found.of(arm)[0])) is not None}
    groups: dict[str, list[str]] = {}
    for arm, (_, _, rest) in points.items():
        groups.setdefault(rest, []).append(arm)
    arms = max(groups.values(), key=len, default=[])
    if len({points[arm][:2] for arm in arms}) < 2:
        return None
    figure, panels = _panels(1, width=6.4)
    axes = panels[0]
    for i, layers in enumerate(sorted({points[arm][0] for arm in arms})):
        own = style.line(i)
        line = sorted((points[arm][1], arm) for arm in arms if points[arm][0] == layers)
        means = [mean(found.losses(arm).values()) for _, arm in line]
        axes.plot([k for k, _ in line], means, label=f"{layers} layer{'' if layers == 1 else 's'} at a time", **own)
        for k, arm in line:
            losses = list(found.losses(arm).values())
            axes.plot([k] * len(losses), losses, "_", color=own["color"], markersize=9)
    intervals = sorted({points[arm][1] for arm in arms})
    if len(intervals) > 1:
        axes.set_xscale("log")
    axes.set_xticks(intervals, [str(k) for k in intervals])
    axes.minorticks_off()
    axes.set(xlabel="steps between draws", ylabel="held-out loss (nats per token)")
    axes.set_title(
        f"Layers at a time and steps between draws: mean, and a bar for each seed\n{_what(found)}", fontsize=10
    )
    axes.legend(frameon=False)
    return figure


FIGURES: Mapping[str, tuple[Callable[[Comparison], Any], str]] = {
    "loss": (loss, "no run of the verdict has ended"),
    "memory": (memory, "no run of the verdict has ended"),
    "time": (times, "the logs of the runs do not tell the parts of a step apart"),
    "sweep": (sweep, "no arms differ in lisa.num_sampled_layers and lisa.interval_steps alone"),
}
"""By name, what draws it (None where there are no numbers for it), and what it takes."""


def _mean_curve(runs: Sequence[Run]) -> list[tuple[int, float, float]]:
    """Steps, mean seconds and mean loss where all runs were measured."""
    points = []
    for step in sorted(set.intersection(*(set(run.curve) for run in runs))):
        losses, seconds = zip(*(run.curve[step] for run in runs), strict=True)
        points.append((step, mean(seconds) or 0.0, sum(losses) / len(losses)))
    return points


def _swept(run: Run) -> tuple[int, int, str] | None:
    """Layers at a time, steps between draws, and all other settings as text; None for a run that has no such settings."""
    config = json.loads(json.dumps(run.config))
    section = config.get(str(config.get("method")))
    if not isinstance(section, dict) or not all(isinstance(section.get(key), int) for key in _SWEPT):
        return None
    layers, interval = (section.pop(key) for key in _SWEPT)
    section.pop("seed", None)
    for key in ("learning_rate", "seed", "output_dir"):
        config["training"].pop(key, None)
    return layers, interval, json.dumps(config, sort_keys=True)


def _what(found: Comparison) -> str:
    seeds = max((len(found.losses(arm)) for arm in found.arms), default=0)
    device = found.devices[0] if found.devices else "no device"
    model, data = (str(found.about.settings[key]) for key in ("model", "data"))
    return f"{model} on {Path(data).name if '/' in data else data}, {seeds} seed{'' if seeds == 1 else 's'}, {device}"


def _panels(count: int, width: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 4.6), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in panels:
        style.plain(panel)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    return figure, panels


def _bars(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.9 + 0.5 * count), layout="constrained")
    axes = figure.subplots()
    style.plain(axes)
    return figure, axes


def _finish_bars(figure: Any, axes: Any, arms: Sequence[str], unit: str, title: str) -> Any:
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.08)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
