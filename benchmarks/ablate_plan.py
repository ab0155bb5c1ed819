"""What ``benchmarks/ablate.py`` runs, and in which order: a function of what has been measured so far.

Nothing here knows how a run is done. Stages: ``rates`` chooses learning rates of the base and of full fine-tuning, ``screen`` changes one
factor of the base at a time, ``final`` trains the best option of each factor on fresh seeds. Every choice looks at the held-out part
``select``; verdicts are read on ``verdict``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lisa_ds.evidence import SELECT, choose

MODEL = "builtin:smollm2-135m"
MAX_LENGTH = 256
DATA: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "path": "gsm8k/train.jsonl",
        "columns": {"question": "prompt", "answer": "completion"},
        "max_length": MAX_LENGTH,
        "on_too_long": "drop",
        "eval_fraction": 0.1,
    },
    "roleplay": {
        "path": "gpteacher/roleplay-simple-deduped.json",
        "columns": {"response": "output"},
        "max_length": MAX_LENGTH,
        "on_too_long": "drop",
        "eval_fraction": 0.3,
    },
}
"""Data sets, the one that is screened on first; paths are relative to ``--data``."""

BASE: dict[str, Any] = {"num_sampled_layers": 2, "interval_steps": 5, "embeddings_lr_scale": 0.1}
RATES = {"base": (5e-4, 1e-3, 2e-3), "full": (5e-5, 1.5e-4, 5e-4)}
SCREEN_SEEDS = (0, 1)
FINAL_SEEDS = (10, 11, 12, 13, 14)  # none that has taken part in a choice


@dataclass(frozen=True)
class Option:
    """One change to the base."""

    name: str
    factor: str
    changes: Mapping[str, Any] = field(hash=False)
    lr_factor: float = 1.0


def _importance(title: str, **sampler: Any) -> Option:
    return Option(title, "importance", {"sampler": sampler})


PROBED = {"calibration_batches": 4, "every": 3}
"""Scores are measured every 15 steps: a probe costs about as many steps as it has batches."""

OPTIONS = (
    _importance("weight_norm", name="weight_norm"),
    _importance("grad_norm, recipe", name="grad_norm", draw="successive", probe_blocks=30, **PROBED),
    _importance("grad_norm, mean", name="grad_norm", score="mean", **PROBED),
    _importance("grad_norm, mean, 1/p", name="grad_norm", score="mean", inverse_probability_cap=4.0, **PROBED),
    _importance("grad_norm, ema", name="grad_norm", score="ema"),
    _importance("fisher, empirical", name="fisher", calibration_batches=16, every=3),
    Option("embeddings, scale 1", "embeddings", {"embeddings_lr_scale": 1.0}),
    Option("embeddings, scale 1, rate / 3", "embeddings", {"embeddings_lr_scale": 1.0}, lr_factor=1 / 3),
    Option("embeddings, scale 0.3", "embeddings", {"embeddings_lr_scale": 0.3}),
    Option("embeddings, scale 0.03", "embeddings", {"embeddings_lr_scale": 0.03}),
    Option("embeddings never", "embeddings", {"embeddings": "never"}),
    Option("embeddings sampled", "embeddings", {"embeddings": "sampled"}),
    Option("embeddings every 2", "embeddings", {"embeddings": {"every": 2}}),
    Option("rewarm 2", "switch", {"rewarm_steps": 2}),
    Option("rewarm 5", "switch", {"rewarm_steps": 5}),
    Option("growth limit 1.01", "switch", {"norm_growth_limit": 1.01}),
    Option("K 2", "interval", {"interval_steps": 2}),
    Option("K 10", "interval", {"interval_steps": 10}),
    Option("K 20", "interval", {"interval_steps": 20}),
    Option("cyclic", "schedule", {"sampler": {"name": "cyclic"}}),
    Option("bernoulli", "schedule", {"sampler": {"name": "bernoulli"}}),
    Option("gamma 4", "gamma", {"num_sampled_layers": 4}),
    Option("gamma 8", "gamma", {"num_sampled_layers": 8}),
)
FACTORS = tuple(dict.fromkeys(option.factor for option in OPTIONS))
COMBINED = "combined"
NOT_COMBINED = ("gamma",)  # it trains more weights at a time: another budget, not a better use of this one


@dataclass(frozen=True)
class Protocol:
    """How much of everything; equal for all arms."""

    device: str
    datasets: tuple[str, ...]
    steps: int = 60
    final_steps: int = 150
    batch: int = 8
    select_rows: int = 240
    verdict_rows: int = 480
    screen_seeds: tuple[int, ...] = SCREEN_SEEDS
    final_seeds: tuple[int, ...] = FINAL_SEEDS
    model: str = MODEL
    options: tuple[Option, ...] = OPTIONS


@dataclass(frozen=True)
class Run:
    """One training run."""

    arm: str
    stage: str
    settings: Mapping[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """Equal for equal settings, whatever the run is for."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def lisa_section(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base with ``changes``."""
    section = {**BASE, **changes}
    if section.get("embeddings") == "never":  # a rate for it would be refused
        section.pop("embeddings_lr_scale")
    return section


def make_run(
    protocol: Protocol, arm: str, stage: str, data: str, seed: int, lr: float, changes: Mapping[str, Any]
) -> Run:
    """A run of ``arm``; ``full`` and ``none`` are methods, all else is LISA with ``changes``."""
    method = arm if arm in ("full", "none") else "lisa"
    settings: dict[str, Any] = {
        "model": protocol.model,
        "data": data,
        "source": DATA[data],
        "method": method,
        "lisa": lisa_section(changes) if method == "lisa" else None,
        "lr": 0.0 if method == "none" else float(f"{lr:.6g}"),
        "seed": seed,
        "steps": {"none": 0, "final": protocol.final_steps}.get(stage if method != "none" else "none", protocol.steps),
        "batch": protocol.batch,
        "rows": {"select": protocol.select_rows, "verdict": protocol.verdict_rows},
        "device": protocol.device,
    }
    return Run(arm, stage, settings)


class Progress:
    """What follows from the results so far.

    Args:
        protocol: How much of everything.
        losses: By key of a run, its held-out losses ``{"select": …, "verdict": …}``.
        closed: Keys of runs that will give no result: an option that is refused, or a run that failed.
    """

    def __init__(
        self, protocol: Protocol, losses: Mapping[str, Mapping[str, float]], closed: Collection[str] = ()
    ) -> None:
        self.protocol, self.losses, self.closed = protocol, losses, closed

    # ---- runs of each stage ---------------------------------------------------------------------------------------

    def before(self) -> Iterator[Run]:
        """No training at all, once for each data set."""
        for data in self.protocol.datasets:
            yield make_run(self.protocol, "none", "before", data, 0, 0.0, {})

    def rates(self, arm: str, data: str) -> list[Run]:
        """The learning rates of an arm on a data set, one seed."""
        seed = self.protocol.screen_seeds[0]
        return [make_run(self.protocol, arm, "rates", data, seed, lr, {}) for lr in RATES[arm]]

    def screen(self, option: Option | None) -> list[Run]:
        """An option, or the base, on the first data set and every screening seed; nothing before the base has its rate."""
        data = self.protocol.datasets[0]
        lr = self.rate("base", data)
        if lr is None:
            return []
        name, changes = (option.name, option.changes) if option else ("base", {})
        lr *= option.lr_factor if option else 1.0
        return [make_run(self.protocol, name, "screen", data, seed, lr, changes) for seed in self.protocol.screen_seeds]

    def final(self, arm: str, data: str) -> list[Run]:
        """An arm on a data set and every final seed; nothing before all it depends on has been chosen."""
        chosen = self._chosen(arm)
        lr = self.rate("full" if arm == "full" else "base", data)
        if chosen is None or lr is None:
            return []
        name = arm if chosen.name in (arm, "base") else f"{arm}: {chosen.name}"
        runs = (
            make_run(self.protocol, arm, "final", data, seed, lr * chosen.lr_factor, chosen.changes)
            for seed in self.protocol.final_seeds
        )
        return [Run(name, run.stage, run.settings) for run in runs]

    def final_arms(self) -> list[str]:
        """In order of interest, should time run out: the two yardsticks, the best of each factor, all of them together."""
        factors = [f for f in FACTORS if any(option.factor == f for option in self.protocol.options)]
        return ["base", "full", *factors, COMBINED]

    # ---- choices --------------------------------------------------------------------------------------------------

    def rate(self, arm: str, data: str) -> float | None:
        """The learning rate with the lowest loss on ``select``; None until all have been tried."""
        runs = self.rates(arm, data)
        if not self._settled(runs):
            return None
        chosen = choose({run.settings["lr"]: self.losses[run.key][SELECT] for run in runs if run.key in self.losses})
        return chosen.rate if chosen else None

    def difference(self, option: Option) -> float | None:
        """Mean of option minus base on ``select`` at equal seeds; None where a seed is missing."""
        pairs = list(zip(self.screen(option), self.screen(None), strict=True))
        if not pairs or any(run.key not in self.losses for pair in pairs for run in pair):
            return None
        gaps = [self.losses[ours.key]["select"] - self.losses[base.key]["select"] for ours, base in pairs]
        return sum(gaps) / len(gaps)

    def best(self, factor: str) -> Option | None:
        """The option of a factor with the lowest mean difference; None until all are settled, or if none could run."""
        options = [option for option in self.protocol.options if option.factor == factor]
        if not all(self._settled(self.screen(option)) and self.screen(option) for option in [None, *options]):
            return None
        measured = [(gap, option) for option in options if (gap := self.difference(option)) is not None]
        return min(measured, key=lambda pair: pair[0])[1] if measured else None

    def combined(self) -> Option | None:
        """The best options of all factors at once, of those better than the base; of two samplers the better one."""
        factors = [f for f in self.final_arms() if f in FACTORS]
        options = [option for option in self.protocol.options if option.factor in factors]
        if not all(self._settled(self.screen(option)) and self.screen(option) for option in [None, *options]):
            return None
        winners = [option for f in factors if f not in NOT_COMBINED and (option := self.best(f)) is not None]
        better = sorted((gap, o.name, o) for o in winners if (gap := self.difference(o)) is not None and gap < 0)
        taken: list[Option] = []
        changes: dict[str, Any] = {}
        for _, _, option in better:
            if not set(changes) & set(option.changes):
                taken.append(option)
                changes.update(option.changes)
        if len(taken) < 2:
            return None
        lr_factor = math.prod(option.lr_factor for option in taken)
        return Option(" + ".join(option.name for option in taken), COMBINED, changes, lr_factor)

    def _chosen(self, arm: str) -> Option | None:
        if arm in ("base", "full"):
            return Option(arm, arm, {})
        return self.combined() if arm == COMBINED else self.best(arm)

    def _settled(self, runs: Iterable[Run]) -> bool:
        return all(run.key in self.losses or run.key in self.closed for run in runs)

    # ---- what to do next ------------------------------------------------------------------------------------------

    def open(self, stages: Collection[str]) -> list[Run]:
        """Runs that could start now and are not settled, the most urgent first; equal settings once."""
        wanted: list[Run] = []
        if "rates" in stages:
            wanted += [*self.before()]
            for data in self.protocol.datasets:
                for arm in RATES:
                    wanted += self.rates(arm, data)
        if "screen" in stages:
            wanted += self.screen(None)
            for option in self.protocol.options:
                wanted += self.screen(option)
        if "final" in stages:
            arms = {(arm, data): self.final(arm, data) for arm in self.final_arms() for data in self.protocol.datasets}
            # Seed by seed, so that whatever there is when time runs out is paired.
            for i in range(len(self.protocol.final_seeds)):
                wanted += [runs[i] for runs in arms.values() if runs]
        first: dict[str, Run] = {}
        for run in wanted:
            if not self._settled([run]):
                first.setdefault(run.key, run)
        return list(first.values())
