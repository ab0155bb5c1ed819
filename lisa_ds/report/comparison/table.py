"""The tables of a comparison, in Markdown: what came of it, what was searched, seed by seed, and what it does not say."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from lisa_ds.evidence import holding
from lisa_ds.report.comparison.read import PEAK, Comparison, mean


def markdown(found: Comparison) -> str:
    """All of it."""
    parts = [
        _head(found),
        _main(found),
        _verdict(found),
        _searched(found),
        _seeds(found),
        _failed(found),
        _caveats(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Comparison) -> str:
    asked, about = found.about.settings["identity"], found.about.settings
    rows = about["rows"]
    ranks = "1 rank" if asked["ranks"] == 1 else f"{asked['ranks']} ranks"
    steps = sorted({run.steps for run in found.runs if run.stage == "verdict"})
    told = f", {' or '.join(map(str, steps))} steps" if steps else ""
    versions = ", ".join(f"{name} {version}" for name, version in found.about.versions.items())
    lines = [
        f"# {about['model']} on {about['data']}",
        "",
        f"{found.about.value:.0f} of {found.about.x:.0f} runs, each on {ranks}{told}, {about['workers']} at a time. "
        f"{rows['train']:,} rows to train on; {rows['select']:,} held-out rows to choose learning rates on, {rows['verdict']:,} others for "
        f"the verdict.",
        f"Machine: {_machine(found)}. Commit {', '.join(found.commits) or found.about.commit}; {versions}.",
        "",
        "```sh",
        str(about["command"]),
        "```",
    ]
    return "\n".join(lines)


def _machine(found: Comparison) -> str:
    devices = [device for device in found.devices if "CPU" not in device]
    return "; ".join([*devices, found.about.settings["machine"]])


def _on_cpu(found: Comparison) -> bool:
    return any("CPU" in device for device in found.devices)


def _main(found: Comparison) -> str:
    reference = found.reference
    rows = [
        [
            *("arm", "seeds", "held-out loss", f"minus {reference}", "learning rate"),
            *(
                "gradients + optimizer, MB (planned)",
                "and weights, MB (planned)",
                "peak, GB (planned)",
                "s/step",
                "tokens/s",
            ),
        ]
    ]
    for arm in found.arms:
        runs = found.of(arm)
        losses = list(found.losses(arm).values())
        gap = None if arm == reference else found.gap(arm)
        planned = found.planned.get(arm, {})
        rows.append(
            [
                arm,
                str(len(losses)),
                f"{statistics.fmean(losses):.4f}" if losses else "-",
                str(gap or "") if arm != reference else "",
                _rate(found, arm),
                _beside(mean(run.state for run in runs), planned.get("state"), 1e6, 1),
                _beside(mean(run.with_weights for run in runs), _with_weights(planned), 1e6, 1),
                _beside(_times(mean(run.values.get(PEAK) for run in runs), 1e9), planned.get("peak"), 1e9, 2),
                _number(mean(run.seconds_per_step for run in runs), 3),
                _number(found.mean(arm, "tokens_per_second"), 0),
            ]
        )
    text = [_table(rows)]
    if (before := found.before) is not None:
        text.append(f"Before training: {before:.4f}. Losses are nats per token, means over the seeds.")
    text.append(
        f"Differences are between runs of one seed, with their 95 % t interval. Bytes are those of one rank{_peaks(found)}."
    )
    missing = [
        what
        for what, has in (
            ("seconds (no log.jsonl)", any(run.seconds_per_step is not None for run in found.of(reference))),
            ("planned bytes (the planner does not know the model)", bool(found.planned)),
        )
        if found.runs and not has
    ]
    if missing:
        text.append(f"Left out: {', '.join(missing)}.")
    return "\n\n".join([text[0], "\n".join(text[1:])])


def _with_weights(planned: Mapping[str, float]) -> float | None:
    return planned["state"] + planned["weights"] if "weights" in planned else None


def _peaks(found: Comparison) -> str:
    if not _on_cpu(found):
        return "; peaks are what torch has allocated"
    return "; a peak on the CPU is the whole process, Python and its libraries included, which the plan does not count"


def _rate(found: Comparison, arm: str) -> str:
    chosen = found.about.settings["chosen"].get(arm)
    if chosen is None:
        return "-"
    return f"{chosen['rate']:.3g}{' (edge)' if chosen['at_edge'] else ''}"


def _verdict(found: Comparison) -> str:
    compared = [(arm, gap) for arm in found.others if (gap := found.gap(arm)) is not None and len(gap.values) > 1]
    if not compared:
        return ""
    holds = holding([gap for _, gap in compared])
    diverged = {arm for arm, _ in compared if found.diverged(arm) or found.diverged(found.reference)}

    def told(which: Iterable[int]) -> str:
        clear = [compared[i] for i in which if compared[i][0] not in diverged]
        return ", ".join(f"{arm} ({gap.mean:+.4f})" for arm, gap in clear) or "none"

    count = "1 comparison" if len(compared) == 1 else f"{len(compared)} comparisons"
    lines = [
        f"{count} with {found.reference}; of so many intervals at 95 %, {0.05 * len(compared):.2g} would miss zero by chance alone.",
        "",
        f"* Interval without zero, each by itself: {told(holds.alone)}.",
        f"* The same at {100 * holds.level:.2f} %, so that all hold together at 95 % (Bonferroni): {told(holds.together)}.",
    ]
    return "\n".join(lines)


def _searched(found: Comparison) -> str:
    asked = found.about.settings["identity"]
    tries = max(len(arm["rates"]) for arm in asked["arms"].values())
    if tries == 1:
        return (
            "Learning rates were not searched: each arm has the one that it was given, or the usual one of its method."
        )
    rows, edges = [["arm", "learning rate: loss on `select`"]], []
    for arm in found.arms:
        chosen = found.about.settings["chosen"].get(arm) or {}
        cells = []
        for run in sorted(found.of(arm, "rates"), key=lambda run: run.rate):
            cell = f"{run.rate:.3g}: {'diverged' if run.loss is None else f'{run.loss:.4f}'}"
            cells.append(f"**{cell}**" if run.rate == chosen.get("rate") else cell)
        rows.append([arm, ", ".join(cells) or "-"])
        edges += [arm] if chosen.get("at_edge") else []
    lines = [
        "## What was searched",
        "",
        f"The learning rate alone: {tries} for each arm, seed {asked['screen_seed']}; the chosen one in bold.",
        "",
        _table(rows),
    ]
    if edges:
        lines += ["", f"At the edge of what was tried, so that a better one may lie beyond: {', '.join(edges)}."]
    return "\n".join(lines)


def _seeds(found: Comparison) -> str:
    seeds = found.about.settings["identity"]["seeds"]
    rows = [["arm", *(f"seed {seed}" for seed in seeds), "spread"]]
    for arm in found.arms:
        losses = found.losses(arm)
        diverged = {run.seed for run in found.of(arm) if run.diverged}
        cells = [f"{losses[seed]:.4f}" if seed in losses else "diverged" if seed in diverged else "-" for seed in seeds]
        spread = f"{max(losses.values()) - min(losses.values()):.4f}" if len(losses) > 1 else "-"
        rows.append([arm, *cells, spread])
    return "\n".join(
        [
            "## Seed by seed",
            "",
            "Held-out loss on `verdict`; a seed is an order of rows, of LISA's draws, and of LoRA's first adapters.",
            "",
            _table(rows),
        ]
    )


def _failed(found: Comparison) -> str:
    failed = found.about.settings["failed"]
    if not failed:
        return ""
    lines = [
        f"* {arm}, {stage}, seed {seed}, learning rate {rate:.3g}: {why}" for arm, stage, seed, rate, why in failed
    ]
    return "\n".join(["## Failed", "", *lines])


def _caveats(found: Comparison) -> str:
    lines = [
        "Only the learning rate was searched; an arm may be better with other settings of its own.",
        "Intervals are over seeds, not over models or data sets.",
        "Held-out loss per token is not the quality of what a model writes.",
    ]
    if diverged := {arm: count for arm in found.arms if (count := found.diverged(arm))}:
        told = ", ".join(f"{arm} ({count} of {len(found.of(arm))} runs)" for arm, count in diverged.items())
        lines.append(
            f"Training diverged: {told}. These runs are in no mean and no interval, and no difference to such an arm is said to hold."
        )
    few = min((len(found.losses(arm)) for arm in found.arms), default=0)
    if few < 3:
        lines.append(f"Some arm has {few} seed{'' if few == 1 else 's'} in the verdict: fewer than three tell little.")
    if found.about.value < (found.about.x or 0):
        lines.append("Not all runs have ended yet.")
    if found.about.settings["workers"] > 1:
        lines.append(
            "Runs shared the machine: seconds and tokens/s say how arms compare, not how fast one would be alone."
        )
    if len(found.commits) > 1:
        lines.append(f"Runs are of several commits: {', '.join(found.commits)}.")
    if len({run.steps for run in found.runs if run.stage == "verdict"}) > 1:
        lines.append("Arms did not make equally many steps: " + ", ".join(_steps(found)) + ".")
    return "\n".join(["## What it cannot tell", "", *(f"* {line}" for line in lines)])


def _steps(found: Comparison) -> list[str]:
    return [f"{arm} {max((run.steps for run in found.of(arm)), default=0)}" for arm in found.arms]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _beside(measured: float | None, planned: float | None, unit: float, digits: int) -> str:
    """A number, and in brackets the one that was planned."""
    shown, expected = ("-" if value is None else f"{value / unit:.{digits}f}" for value in (measured, planned))
    return shown if planned is None else f"{shown} ({expected})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])
