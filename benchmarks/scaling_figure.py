"""The figure of benchmarks/scaling.py: lines from the planner, points from live tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scaling_plan import LLAMA_7B, LLAMA_70B, TINYLLAMA, planned, shape_of

from lisa_ds.memory import SAMPLED_KINDS
from lisa_ds.records import Record

MODELS = {
    # model: label, colour, ranks over which its lines are drawn
    "small": ("Llama of 8 small blocks", "tab:green", (1, 8)),
    TINYLLAMA: ("TinyLlama 1.1B", "tab:blue", (1, 1024)),
    LLAMA_7B: ("Llama 2 7B", "tab:orange", (1, 1024)),
    LLAMA_70B: ("Llama 3.1 70B", "tab:red", (1, 1024)),
}
STYLES = {"lisa": ("LISA, 2 blocks", "-"), "full": ("full fine-tuning", "--")}


def draw(measured: list[Record], path: Path) -> None:
    """Bytes on a rank, and bytes into reduce-scatter, over the number of ranks."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    state, traffic = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for model, (_, colour, (first, last)) in MODELS.items():
        for method, (_, line) in STYLES.items():
            ranks = [2**power for power in range(11) if first <= 2**power <= last]
            plans = [planned(shape_of(model), method, count) for count in ranks]
            state.plot(
                ranks, [sum(plan[kind] for kind in SAMPLED_KINDS) for plan in plans], line, color=colour, linewidth=1.2
            )
            points = _state(measured, model, method)
            state.plot(*points, "o", color=colour, markersize=6, fillstyle="full" if model == "small" else "none")
            if model == "small":
                traffic.plot(ranks, [plan["reduce_scatter"] for plan in plans], line, color=colour, linewidth=1.2)
                traffic.plot(*_points(measured, model, method, ("reduce_scatter",)), "o", color=colour, markersize=6)
    state.set_title("gradients, master copy and moments", fontsize=11)
    state.set_ylabel("bytes on a rank")
    _axes(state, [2**power for power in range(11)])
    traffic.set_title("small Llama: into reduce-scatter, a step", fontsize=11)
    traffic.set_ylabel("bytes on a rank")
    traffic.set_ylim(0, 1.15 * traffic.dataLim.y1)
    _axes(traffic, [1, 2, 4, 8], log_y=False)
    models = [Line2D([], [], color=colour, label=label, linewidth=3) for label, colour, _ in MODELS.values()]
    lines = [
        Line2D([], [], color="black", linestyle=line, label=f"{label}: planned") for label, line in STYLES.values()
    ]
    marks = [
        Line2D([], [], color="black", marker="o", linestyle="", label="live tensors, real ranks"),
        Line2D(
            [], [], color="black", marker="o", fillstyle="none", linestyle="", label="live tensors, one simulated rank"
        ),
    ]
    figure.legend(handles=[*models, *lines, *marks], loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _state(measured: list[Record], model: str, method: str) -> tuple[list[float], list[float]]:
    return _points(measured, model, method, SAMPLED_KINDS)


def _points(measured: list[Record], model: str, method: str, kinds: Any) -> tuple[list[float], list[float]]:
    sums: dict[float, float] = {}
    for record in measured:
        if record.settings["model"] == model and record.variant == method and record.name[6:] in kinds:
            sums[record.x or 0] = sums.get(record.x or 0, 0) + record.value
    return list(sums), list(sums.values())


def _axes(axes: Any, ranks: list[int], *, log_y: bool = True) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlabel("ranks")
    if log_y:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _spelled(value)))
    axes.grid(alpha=0.3)


def _spelled(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
