"""Does LISA's gap to the optimum of a convex problem shrink like one over the square root of the steps, as the paper's Theorem 1 has it?

Usage: python benchmarks/convex_rate.py --out docs/results/convex_rate.jsonl --figure docs/results/convex_rate.png [--steps 30000]

The problem is least absolute deviation with one minibatch a step: convex, not smooth, and flat nowhere near its minimum, so that
neither strong convexity nor a smooth valley hides the rate. Its 64 parameters are cut into 16 blocks; `LayerSampler` draws gamma of
them every 5 steps and `MaskedAdamW`, at lr 1 / sqrt(step), trains these and drops the state of the others, as the engine does. The
optimum is found by an interior-point method and certified by its dual. Two controls must fail to converge: blocks that are never
drawn, and a rate that does not fall.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lisa_ds import LayerSampler, LisaConfig, MaskedAdamW, records

Array = npt.NDArray[np.float64]

BLOCKS, WIDTH, ROWS, BATCH = 16, 4, 192, 8
INTERVAL_STEPS = 5
RATE = 1.0
START = 0.3  # standard deviation of where training starts, around the minimum, as fine-tuning starts near one
MEASURES = ("mean_gap", "gap_of_mean", "last_gap")
"""Mean of the gaps of all iterates, which Theorem 1 bounds; gap of the mean iterate, which by convexity is below it; gap of the last."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    gamma: int = BLOCKS
    sampler: str = "uniform"
    falling: bool = True

    @property
    def label(self) -> str:
        """What it is called in the figure."""
        if self.sampler == "fixed":
            return f"control: the same {self.gamma} blocks for ever"
        if not self.falling:
            return f"control: {self.gamma} blocks, a rate that does not fall"
        return f"{self.gamma} of {BLOCKS} blocks" if self.gamma < BLOCKS else "all blocks"


ARMS = (
    Arm("full"),
    Arm("gamma 1", 1),
    Arm("gamma 2", 2),
    Arm("gamma 4", 4),
    Arm("control: fixed blocks", 4, sampler="fixed"),
    Arm("control: constant rate", 4, falling=False),
)


class Problem:
    """Mean absolute residual of ``ROWS`` linear equations that cannot all hold."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.rows: Array = random.standard_normal((ROWS, BLOCKS * WIDTH))
        truth = random.standard_normal(BLOCKS * WIDTH)
        self.targets: Array = self.rows @ truth + random.laplace(size=ROWS)
        self.solution, self.bound = solve(self.rows, self.targets)
        self.minimum = float(self.value(self.solution))

    def value(self, x: Array) -> Array:
        """Of points ``(..., 64)``."""
        found: Array = np.abs(self.targets - x @ self.rows.T).mean(-1)
        return found

    def subgradient(self, x: Array, chosen: npt.NDArray[np.int64]) -> Array:
        """Of the rows ``chosen``, ``(S, B)``, at the points ``(S, 64)``."""
        rows = self.rows[chosen]
        residual = self.targets[chosen] - np.einsum("sbd,sd->sb", rows, x)
        found: Array = -np.einsum("sb,sbd->sd", np.sign(residual), rows) / chosen.shape[1]
        return found


def solve(rows: Array, targets: Array, tolerance: float = 1e-12) -> tuple[Array, float]:
    """Least absolute deviation by a primal-dual interior-point method (Mehrotra's predictor and corrector).

    Returns:
        The point, and a lower bound of the minimum by weak duality: a vector between -1 and 1 that is orthogonal to all columns.
    """
    n = len(rows)
    x, s = np.full(n, 0.5), np.full(n, 0.5)  # the dual, moved to [0, 1]: maximise targets @ x with rows.T @ x fixed
    fixed = rows.T @ x
    y = np.linalg.lstsq(rows, -targets, rcond=None)[0]
    residual = -targets - rows @ y
    z = np.maximum(residual, 0) + 1e-3
    w = z - residual

    def direction(rx: Array, rs: Array) -> tuple[Array, Array, Array, Array]:
        q = 1 / (z / x + w / s)
        t = -targets - rows @ y - z + w - rx / x + rs / s
        dy = np.linalg.solve(rows.T @ (q[:, None] * rows), fixed - rows.T @ x + rows.T @ (q * t))
        dx = q * (rows @ dy - t)
        return dx, dy, (rx - z * dx) / x, (rs + w * dx) / s

    def longest(*pairs: tuple[Array, Array]) -> float:
        return min([1.0, *(0.9995 * float(np.min(-v[d < 0] / d[d < 0])) for v, d in pairs if (d < 0).any())])

    for _ in range(100):
        gap = x @ z + s @ w
        if gap < tolerance:
            break
        dx, dy, dz, dw = direction(-x * z, -s * w)
        a, b = longest((x, dx), (s, -dx)), longest((z, dz), (w, dw))
        ahead = (x + a * dx) @ (z + b * dz) + (s - a * dx) @ (w + b * dw)
        centre = gap / (2 * n) * (ahead / gap) ** 3
        dx, dy, dz, dw = direction(centre - x * z - dx * dz, centre - s * w + dx * dw)
        a, b = longest((x, dx), (s, -dx)), longest((z, dz), (w, dw))
        x, s, y, z, w = x + a * dx, s - a * dx, y + b * dy, z + b * dz, w + b * dw
    return -y, float(targets @ (2 * x - 1)) / n


def train(problem: Problem, arm: Arm, steps: int, seeds: Sequence[int], marks: Sequence[int]) -> dict[str, Array]:
    """Train from near the minimum, every seed with a start, draws and minibatches of its own.

    Returns:
        For each of :data:`MEASURES`, ``(marks, seeds)``.
    """
    config = {"num_sampled_layers": arm.gamma, "interval_steps": INTERVAL_STEPS, "sampler": arm.sampler}
    samplers = [LayerSampler(BLOCKS, LisaConfig(**config, seed=seed)) for seed in seeds]  # type: ignore[arg-type]
    randoms = [np.random.default_rng((seed, 1)) for seed in seeds]
    starts = [problem.solution + START * random.standard_normal(BLOCKS * WIDTH) for random in randoms]
    points = torch.tensor(np.stack(starts), dtype=torch.float32).view(len(seeds), BLOCKS, WIDTH)
    gradients = torch.zeros_like(points)
    # One optimizer holds all seeds: blocks without a gradient are neither read nor written.
    blocks = [[torch.nn.Parameter(points[i, j]) for j in range(BLOCKS)] for i in range(len(seeds))]
    optimizer = MaskedAdamW([p for one in blocks for p in one], lr=RATE, weight_decay=0.0)
    group = optimizer.param_groups[0]
    view, slope = points.view(len(seeds), -1).numpy(), gradients.view(len(seeds), -1).numpy()
    mean, gaps = np.zeros(view.shape), np.zeros(len(seeds))
    found: dict[str, list[Array]] = {measure: [] for measure in MEASURES}
    for step in range(1, steps + 1):
        if (step - 1) % INTERVAL_STEPS == 0:
            for one, sampler, gradient in zip(blocks, samplers, gradients, strict=True):
                drawn = sampler.layers_at((step - 1) // INTERVAL_STEPS)
                for j, parameter in enumerate(one):
                    parameter.grad = gradient[j] if j in drawn else None
                    if j not in drawn:
                        optimizer.state.pop(parameter, None)
        chosen = np.stack([random.integers(ROWS, size=BATCH) for random in randoms])
        slope[:] = problem.subgradient(view.astype(np.float64), chosen)
        group["lr"] = RATE / math.sqrt(step) if arm.falling else RATE
        optimizer.step()
        here = view.astype(np.float64)
        mean += (here - mean) / step
        gaps += (problem.value(here) - problem.minimum - gaps) / step
        if step in marks:
            found["mean_gap"].append(gaps.copy())
            found["gap_of_mean"].append(problem.value(mean) - problem.minimum)
            found["last_gap"].append(problem.value(here) - problem.minimum)
    return {measure: np.array(values) for measure, values in found.items()}


def marks_of(steps: int, first: int = 30, per_decade: int = 6) -> list[int]:
    """Steps at which gaps are read, evenly spread on a logarithmic axis."""
    count = round(math.log10(steps / first) * per_decade) + 1
    return sorted({round(mark) for mark in np.geomspace(first, steps, count)})


def slope(marks: Sequence[int], gaps: Array) -> tuple[float, float]:
    """Slope of log gap over log steps, fitted for each seed: mean, and half of its 95 % t interval.

    Args:
        marks: Steps.
        gaps: ``(marks, seeds)``.
    """
    from lisa_ds.evidence import Gap

    fits = [float(np.polyfit(np.log(marks), np.log(column), 1)[0]) for column in gaps.T]
    return Gap(tuple(fits)).mean, Gap(tuple(fits)).half_width()


def main() -> None:
    """Train all arms, record what came of it, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; written anew")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem()
    print(f"minimum {problem.minimum:.12f}, at least {problem.bound:.12f} by the dual")
    marks = marks_of(arguments.steps)
    arguments.out.unlink(missing_ok=True)
    for arm in ARMS:
        start = time.perf_counter()
        found = train(problem, arm, arguments.steps, range(arguments.seeds), marks)
        for measure, gaps in found.items():
            record(arguments.out, arm, measure, marks, gaps)
        late = [i for i, mark in enumerate(marks) if mark >= arguments.steps / 100]
        fitted = ", ".join(
            f"{m} {s:+.2f} ± {h:.2f}"
            for m, gaps in found.items()
            for s, h in [slope([marks[i] for i in late], gaps[late])]
        )
        print(
            f"{arm.name:24} slopes over the last two decades: {fitted}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    if arguments.figure:
        draw(list(records.read(arguments.out)), arguments.figure)


def record(path: Path, arm: Arm, measure: str, marks: Sequence[int], gaps: Array) -> None:
    """Gaps at every mark, seed by seed in the settings, and the slope over the last two decades."""
    common: dict[str, Any] = {
        "variant": arm.name,
        "device": "CPU",
        "commit": records.commit(),
        "versions": records.versions(),
        "n": gaps.shape[1],
    }
    about = {"gamma": arm.gamma, "sampler": arm.sampler, "falling": arm.falling, "interval_steps": INTERVAL_STEPS}
    for mark, values in zip(marks, gaps, strict=True):
        s = records.spread(values.tolist())
        point = {"value": s.value, "low": s.low, "high": s.high, "unit": "", "x": mark, "x_label": "step"}
        records.append(path, records.Record(name=measure, **point, **common, settings=about))
    late = [i for i, mark in enumerate(marks) if mark >= marks[-1] / 100]
    mean, half = slope([marks[i] for i in late], gaps[late])
    fit = {"value": mean, "low": mean - half, "high": mean + half, "unit": ""}
    about = {**about, "from_step": marks[late[0]], "to_step": marks[-1], "interval": "95 % t over seeds"}
    records.append(path, records.Record(name=f"{measure}_slope", **fit, **common, settings=about))


def draw(measured: Sequence[records.Record], path: Path) -> None:
    """Gaps over steps, one panel for each measure, beside the slope of the theorem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "mean_gap": "mean of the gaps of all iterates",
        "gap_of_mean": "gap of the mean iterate",
        "last_gap": "gap of the last iterate",
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 6.2), layout="constrained", sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        for i, arm in enumerate(ARMS):
            points = [r for r in measured if r.name == measure and r.variant == arm.name]
            fit = next(r for r in measured if r.name == f"{measure}_slope" and r.variant == arm.name)
            x = [r.x or 0 for r in points]
            style = "--" if arm.name.startswith("control") else "-"
            told = f"{arm.label}: {fit.value:+.2f} ± {(fit.high or 0) - fit.value:.2f}"
            axes.plot(x, [r.value for r in points], style, color=f"C{i}", label=told)
            axes.fill_between(x, [r.low or 0 for r in points], [r.high or 0 for r in points], color=f"C{i}", alpha=0.2)
        top = max(r.value for r in measured if r.name == measure)
        axes.plot(x, [top * math.sqrt(x[0] / step) for step in x], ":", color="black", label="1 / sqrt(steps): -0.50")
        axes.set(xscale="log", yscale="log", xlabel="steps", title=titles[measure])
        axes.grid(alpha=0.3)
        # Below: curves are everywhere.
        axes.legend(
            title="slope over the last two decades, 95 % interval",
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
        )
    panels[0].set_ylabel("gap to the minimum: median and 20th to 80th percentile")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
