"""Tables and figure of ``benchmarks/ablate.py``, from its records alone; what was chosen is worked out anew by the same rules."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ablate_plan import DATA, RATES, Progress, Protocol

from lisa_ds.evidence import Gap, holding
from lisa_ds.records import Record

BEGIN, END = "<!-- tables: make ablate-report -->", "<!-- end of tables -->"

LABELS = {
    "base": "base",
    "full": "full fine-tuning",
    "weight_norm": "drawn by weight norms",
    "grad_norm, recipe": "drawn by gradient norms, calibrated",
    "grad_norm, mean": "drawn by norms of mean gradients",
    "grad_norm, mean, 1/p": "drawn by norms of mean gradients / p",
    "grad_norm, ema": "drawn by averaged gradient norms",
    "fisher, empirical": "drawn by Fisher information",
    "embeddings, scale 1": "embeddings at the full rate",
    "embeddings, scale 1, rate / 3": "embeddings and layers at 1/3 of the rate",
    "embeddings, scale 0.3": "embeddings at 0.3 of the rate",
    "embeddings, scale 0.03": "embeddings at 0.03 of the rate",
    "embeddings never": "embeddings frozen",
    "embeddings sampled": "embeddings drawn like a layer",
    "embeddings every 2": "embeddings in every second interval",
    "rewarm 2": "warm-up of 2 steps at a switch",
    "rewarm 5": "warm-up of 5 steps at a switch",
    "growth limit 1.01": "growth of gradients limited to 1 %",
    "K 2": "new layers every 2 steps",
    "K 10": "new layers every 10 steps",
    "K 20": "new layers every 20 steps",
    "cyclic": "layers in turn",
    "bernoulli": "each layer drawn for itself",
    "gamma 4": "4 layers at a time",
    "gamma 8": "8 layers at a time",
}
"""What the options are called in the figure."""


class Measured:
    """The records as the plan sees them."""

    def __init__(self, found: Sequence[Record]) -> None:
        runs: dict[str, Record] = {}
        self.losses: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        self.drawn: dict[str, Any] = {}
        for record in found:
            key = record.settings["key"]
            if record.name.endswith("_loss"):
                runs[key] = record
                self.losses.setdefault(key, {})[record.name.removesuffix("_loss")] = record.value
            elif record.name == "run_time":
                self.seconds[key] = record.value
                self.drawn[key] = record.settings.get("drawn") or None
        self.runs = {key: runs[key] for key, losses in self.losses.items() if set(losses) == {"select", "verdict"}}
        self.losses = {key: self.losses[key] for key in self.runs}
        trained = [record for record in self.runs.values() if record.settings["method"] != "none"]
        if not trained:
            raise SystemExit("ablate: the file holds no training run")
        device, batch, select, verdict = _commonest(
            (r.settings["device"], r.settings["batch"], *(r.settings["rows"][part] for part in ("select", "verdict")))
            for r in trained
        )
        trained = [record for record in trained if record.settings["device"] == device]
        short = [r.settings["steps"] for r in trained if r.settings["stage"] != "final"]
        final = [r.settings["steps"] for r in trained if r.settings["stage"] == "final"]
        seen = {record.settings["data"] for record in trained}
        self.protocol = Protocol(
            device=device,
            datasets=tuple(name for name in DATA if name in seen),
            steps=_commonest(short or [Protocol.steps]),
            final_steps=_commonest(final or [Protocol.final_steps]),
            batch=batch,
            select_rows=select,
            verdict_rows=verdict,
            model=_commonest(record.settings["model"] for record in trained),
        )
        # What has no result will not get one: the plan shall choose among what there is.
        self.progress = Progress(self.protocol, self.losses, _Everything())
        self.trained = trained

    def gap(self, arm: str, reference: str, data: str) -> Gap | None:
        """Verdict loss of one final arm minus another's, at the seeds that both have."""
        pairs = zip(self.progress.final(arm, data), self.progress.final(reference, data), strict=False)
        values = [
            self.losses[ours.key]["verdict"] - self.losses[theirs.key]["verdict"]
            for ours, theirs in pairs
            if ours.key in self.losses and theirs.key in self.losses
        ]
        return Gap(tuple(values)) if values else None

    def final_losses(self, arm: str, data: str) -> list[float]:
        """Verdict losses of an arm, seed by seed."""
        runs = self.progress.final(arm, data)
        return [self.losses[run.key]["verdict"] for run in runs if run.key in self.losses]

    def final_name(self, arm: str) -> str:
        """What an arm turned out to be."""
        runs = self.progress.final(arm, self.protocol.datasets[0])
        return runs[0].arm if runs else arm

    def same_draws(self) -> list[list[str]]:
        """Arms that should draw by different rules, and drew the same layers in every run: nothing was compared."""
        groups: dict[str, list[str]] = {}
        for option in [None, *(option for option in self.protocol.options if "sampler" in option.changes)]:
            draws = [self.drawn.get(run.key) for run in self.progress.screen(option)]
            if draws and all(draws):
                groups.setdefault(repr(draws), []).append(option.name if option else "base")
        return [names for names in groups.values() if len(names) > 1]

    def comparisons(self) -> list[tuple[str, str, Gap]]:
        """Every final arm but the base against the base, on every data set."""
        arms = [arm for arm in self.progress.final_arms() if arm != "base"]
        return [(arm, d, g) for d in self.protocol.datasets for arm in arms if (g := self.gap(arm, "base", d))]


class _Everything(frozenset[str]):
    def __contains__(self, item: object) -> bool:
        return True


def tables(found: Sequence[Record]) -> str:
    """Markdown: the protocol, learning rates, screening, and the paired comparison."""
    measured = Measured(found)
    parts = [_protocol(measured), _rates(measured), _screen(measured)]
    parts += [_final(measured, data) for data in measured.protocol.datasets]
    return "\n\n".join(part for part in [*parts, _caveat(measured)] if part)


def insert(path: Path, text: str) -> None:
    """Replace what stands between the marks of a document."""
    before, mark, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{path}: should hold the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _protocol(m: Measured) -> str:
    p = m.protocol
    record = m.trained[-1]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    commits = ", ".join(sorted({r.commit for r in m.trained}))
    seconds = statistics.median(m.seconds[r.settings["key"]] for r in m.trained if r.settings["key"] in m.seconds)
    lines = [
        f"{len(m.trained)} training runs of `{p.model}` on {record.device}, {record.settings['workers']} at a time; batch {p.batch}, "
        f"{p.steps} steps for `rates` and `screen`, {p.final_steps} for `final`; at most {p.select_rows} held-out rows to choose on "
        f"and {p.verdict_rows} others for verdicts; a run took {seconds:.1f} s (median). Commit {commits}; {versions}.",
    ]
    for data in p.datasets:
        before = next((m.losses[run.key] for run in m.progress.before() if run.settings["data"] == data), None)
        if before and all(before.values()):
            lines.append(
                f"Before training on {data}: {before['select']:.4f} on `select`, {before['verdict']:.4f} on `verdict`."
            )
    return "\n".join(lines)


def _rates(m: Measured) -> str:
    rows = []
    for data in m.protocol.datasets:
        for arm in RATES:
            chosen = m.progress.rate(arm, data)
            cells = []
            for run in m.progress.rates(arm, data):
                if run.key in m.losses:
                    cell = f"{run.settings['lr']:.2g}: {m.losses[run.key]['select']:.4f}"
                    cells.append(f"**{cell}**" if run.settings["lr"] == chosen else cell)
            if cells:
                edge = ", at the edge of what was tried" if chosen in (min(RATES[arm]), max(RATES[arm])) else ""
                rows.append(f"| {data} | {arm} | {', '.join(cells)}{edge} |")
    if not rows:
        return ""
    head = ["### Learning rates", "", "Loss on `select`, one seed; the chosen rate in bold.", ""]
    return "\n".join([*head, "| data | arm | rate: loss |", "| --- | --- | --- |", *rows])


def _screened(m: Measured) -> list[tuple[float, str, str, tuple[float, ...]]]:
    found = []
    for option in m.protocol.options:
        pairs = zip(m.progress.screen(option), m.progress.screen(None), strict=False)
        values = tuple(
            m.losses[ours.key]["select"] - m.losses[base.key]["select"]
            for ours, base in pairs
            if ours.key in m.losses and base.key in m.losses
        )
        if values:
            found.append((statistics.fmean(values), option.factor, option.name, values))
    return sorted(found)


def _screen(m: Measured) -> str:
    screened = _screened(m)
    if not screened:
        return ""
    best = {m.progress.best(factor) for factor in {factor for _, factor, _, _ in screened}}
    names = {option.name for option in best if option}
    lines = [
        "### Screening",
        "",
        f"{m.protocol.datasets[0]}: loss on `select` minus the base's at the same seed, lowest first; the best option of each factor, "
        "in bold, goes on. Two seeds tell little: this only chooses.",
        "",
        "| option | factor | mean | seed by seed |",
        "| --- | --- | --- | --- |",
    ]
    for mean, factor, name, values in screened:
        shown = f"**{name}**" if name in names else name
        lines.append(f"| {shown} | {factor} | {mean:+.4f} | {', '.join(f'{value:+.4f}' for value in values)} |")
    unmeasured = [o.name for o in m.protocol.options if o.name not in {name for _, _, name, _ in screened}]
    if unmeasured:
        lines += ["", f"Not measured: {', '.join(unmeasured)}."]
    for names in m.same_draws():
        lines += ["", f"**Drew the same layers in every run, so that they are one arm: {', '.join(names)}.**"]
    return "\n".join(lines)


def _final(m: Measured, data: str) -> str:
    rows = []
    for arm in m.progress.final_arms():
        losses = m.final_losses(arm, data)
        if losses:
            to_base = "" if arm == "base" else m.gap(arm, "base", data) or ""
            to_full = "" if arm == "full" else m.gap(arm, "full", data) or ""
            rows.append(
                f"| {m.final_name(arm)} | {len(losses)} | {statistics.fmean(losses):.4f} | {to_base} | {to_full} |"
            )
    if not rows:
        return ""
    return "\n".join(
        [
            f"### {data}: paired comparison",
            "",
            "Loss on `verdict`, on seeds that took part in no choice; mean paired difference with its 95 % t interval.",
            "",
            "| arm | seeds | loss | minus base | minus full |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _caveat(m: Measured) -> str:
    compared = m.comparisons()
    if not compared:
        return ""
    holds = holding([gap for _, _, gap in compared])

    def told(clear: Iterable[int]) -> str:
        names = (f"{m.final_name(arm)} on {d} ({gap.mean:+.4f})" for arm, d, gap in (compared[i] for i in clear))
        return ", ".join(names) or "none"

    return "\n".join(
        [
            f"These are {len(compared)} comparisons with the base: of so many intervals at 95 %, {0.05 * len(compared):.1f} would miss "
            "zero by chance alone.",
            "",
            f"* Interval without zero, each comparison by itself: {told(holds.alone)}.",
            f"* The same at {100 * holds.level:.2f} %, so that all hold together at 95 % (Bonferroni): {told(holds.together)}.",
        ]
    )


def draw(found: Sequence[Record], path: Path) -> None:
    """Screening on the left, the paired comparison on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    m = Measured(found)
    screened, compared = _screened(m), m.comparisons()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 7.8), layout="constrained")
    for i, (mean, _, _, values) in enumerate(screened):
        left.plot(values, [i] * len(values), "o", color="tab:grey", markersize=4, label="" if i else "one seed")
        left.plot(mean, i, "D", color="tab:blue", markersize=6, label="" if i else "mean of the seeds")
    left.set_yticks(range(len(screened)), [LABELS[name] for _, _, name, _ in screened])
    left.set_title(f"screening: {m.protocol.datasets[0]}, {m.protocol.steps} steps")
    arms = list(dict.fromkeys(arm for arm, _, _ in compared))
    for j, data in enumerate(m.protocol.datasets):
        for arm, d, gap in compared:
            if d == data:
                half, place = gap.half_width(), arms.index(arm) + 0.3 * (j - 0.5)
                alone = math.isinf(half)
                style = {"fmt": "o", "color": f"C{j}", "capsize": 3, "fillstyle": "none" if alone else "full"}
                right.errorbar(gap.mean, place, xerr=None if alone else half, **style)
                edge = right.get_yaxis_transform()  # outside: nothing is in the way there
                right.text(
                    1.01, place, f"n = {len(gap.values)}", transform=edge, va="center", fontsize=8, color=f"C{j}"
                )
        right.plot([], [], "o", color=f"C{j}", label=f"{data}: mean, 95 % interval")
    if any(math.isinf(gap.half_width()) for _, _, gap in compared):
        right.plot([], [], "o", color="black", fillstyle="none", label="a single pair: no interval")
    right.set_yticks(range(len(arms)), [_label(m.final_name(arm)) for arm in arms])
    right.set_title(f"pairs of n seeds: {m.protocol.final_steps} steps")
    for axes in (left, right):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.05)
        axes.set_xlabel("held-out loss minus the base's (nats per token)")
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=6)
        # Below: points are everywhere.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _label(arm: str) -> str:
    """A final arm, ``factor: option + option``, in plain words."""
    return "\n+ ".join(LABELS[option] for option in arm.rpartition(": ")[2].split(" + "))


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
