"""All that a comparison was asked for, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lisa_ds.compare import rates
from lisa_ds.compare.arms import RATES, Arm, override
from lisa_ds.compare.protocol import SCREEN_SEED, TRIES, Protocol, Run
from lisa_ds.config import RunConfig, load_config
from lisa_ds.config.base import show
from lisa_ds.config.files import parse_yaml, read_mapping
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.files import whole
from lisa_ds.memory.methods import METHODS
from lisa_ds.memory.settings import architecture_of

EVALUATIONS = 5
"""Held-out losses of a run of the verdict, at equal distances, where its file does not say when to evaluate."""

STATISTICS_STEPS = 20
"""Steps after which norms of layers are recorded, where the file does not say: as often for all arms, since it takes time."""

_CHOOSE_BY_HELD_OUT: dict[str, Callable[[Any], bool]] = {
    "early_stopping_patience": lambda value: value is not None,
    "load_best_model_at_end": bool,
    "lr_scheduler_type": lambda value: value in ("reduce_lr_on_plateau", "greedy"),
}
"""Keys of ``training`` by which a run looks at its held-out rows while it trains."""

_DEEPSPEED = "deepspeed"

_OURS = {
    "training.output_dir": "each run has a directory of its own in --out",
    "training.learning_rate": f"each arm searches its own; see --rates, and the key {RATES} of a file of arms",
    "training.seed": "--seeds says which",
    "data.eval_part": "learning rates are chosen on select, and the verdict is read on verdict",
}
"""Keys that the comparison sets, and that make no sense on its command line."""


@dataclass(frozen=True)
class Request:
    """What is compared, and where that is kept.

    Raises:
        ConfigError: Run, arms, learning rates or seeds do not make a comparison; nothing has been run or written.
    """

    file: str
    """Of the run."""

    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    out: Path
    ranks: int
    """Of each run."""

    on_cpu: bool = True
    num_gpus: int | None = None
    """What the launcher is told; None for all GPUs, or a CPU rank."""

    screen_seed: int = SCREEN_SEED
    tries: int | None = None
    """Learning rates of an arm; None for as many as the arms have, or :data:`TRIES`."""

    against: str | None = None
    """The arm that others are compared with; None for the first."""

    _configs: dict[str, RunConfig] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        base = self.base
        for word in self.overrides:
            key = word.partition("=")[0]
            if key in _OURS:
                raise ConfigError(f"command line: {key}: is not for a comparison to be given: {_OURS[key]}")
        if base.data.eval_part != "all":
            raise ConfigError(f"{base.where('data.eval_part')}: leave it out: {_OURS['data.eval_part']}")
        if not (base.data.eval_fraction or base.data.eval_split or base.data.eval_path):
            raise ConfigError(
                f"{base.where('data')}: nothing is held out to compare by; set data.eval_fraction, eval_split or eval_path"
            )
        if base.training.get("data_seed") is not None:
            raise ConfigError(
                f"{base.where('training.data_seed')}: would give the rows of all seeds one order; leave it out"
            )
        if self.screen_seed in self.seeds:
            raise ConfigError(
                f"--screen-seed: {self.screen_seed} is among --seeds: what chose the learning rates must not judge them"
            )
        _refuse_choosing(base)
        names = [arm.name for arm in self.arms]
        if self.against is not None and self.against not in names:
            raise ConfigError(f"--against: should be one of {', '.join(names)}, got {self.against!r}")
        for arm in self.arms:
            self._configs[arm.name] = self._checked(arm)
        self._refuse_twins()
        _ = self.protocol  # which refuses learning rates

    @cached_property
    def base(self) -> RunConfig:
        """The run without any arm's changes."""
        return load_config(self.file, self.overrides)

    @property
    def configs(self) -> Mapping[str, RunConfig]:
        """The run as each arm changes it, by name."""
        return self._configs

    @property
    def reference(self) -> str:
        """The arm that others are compared with."""
        return self.against or self.arms[0].name

    @cached_property
    def protocol(self) -> Protocol:
        """Learning rates and seeds.

        Raises:
            ConfigError: An arm has no learning rates, or not as many as the others.
        """
        given = [arm for arm in self.arms if arm.rates]
        tries = self.tries or (len(given[0].rates) if given else TRIES)
        parameters = 0 if len(given) == len(self.arms) else self._parameters()
        found = {}
        for arm in self.arms:
            method = self._configs[arm.name].method
            chosen = arm.rates or rates.grid(method, parameters, tries)
            if chosen is None:
                raise ConfigError(
                    f"{arm.where}: no usual learning rate of method {method!r} is known; give the arm's {RATES} in --arms FILE"
                )
            if len(chosen) != tries:
                asked = f"--rates says {tries}" if self.tries else f"{given[0].name!r} tries {tries}"
                raise ConfigError(
                    f"{arm.where}: {RATES}: each arm tries equally many; {asked}, and here are {len(chosen)}"
                )
            found[arm.name] = chosen
        return Protocol(found, self.seeds, self.screen_seed)

    def kept(self) -> Request:
        """The same with a copy of the run's file in the directory: the file may be edited while runs are still to come.

        DeepSpeed's keys are in it in place of the path of their file, which may be edited as well.
        """
        copy = self.out / f"run{Path(self.file).suffix}"
        fields = read_mapping(self.file)
        with whole(copy) as unfinished:
            if isinstance(fields.get(_DEEPSPEED), str):
                unfinished.write_text(
                    json.dumps(_written_out(fields), indent=2) + "\n", encoding="utf-8"
                )  # JSON is YAML
            else:
                unfinished.write_bytes(Path(self.file).read_bytes())
        arms = tuple(replace(arm, changes=_written_out(arm.changes)) for arm in self.arms)
        return replace(self, file=str(copy), overrides=tuple(map(_written_out_word, self.overrides)), arms=arms)

    def overrides_of(self, run: Run) -> list[str]:
        """``key=value`` of everything that a run changes in the file."""
        place = override("training.output_dir", str(self.place(run)))
        return [*self.overrides, *self._overrides_of_arm(run.arm), *self._own(run), place]

    def place(self, run: Run) -> Path:
        """The run's directory: a name to read, and a hash of all its settings."""
        return self.out / "runs" / self.name(run)

    def name(self, run: Run) -> str:
        """Of the run's directory."""
        config = load_config(self.file, [*self.overrides, *self._overrides_of_arm(run.arm), *self._own(run)])
        settings = json.dumps([_read(config), self.ranks], sort_keys=True)
        arm = re.sub(r"[^A-Za-z0-9.]+", "_", run.arm)[:40]
        return f"{arm}-{run.stage}-s{run.seed}-lr{run.rate:.3g}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def identity(self) -> dict[str, Any]:
        """What another call has to share to go on with this comparison, as plain values."""
        return {
            "run": _dump(self.base, without=("learning_rate", "seed")),
            "ranks": self.ranks,
            "screen_seed": self.screen_seed,
            "arms": {
                arm.name: {"changes": _written_out(arm.changes), RATES: list(self.protocol.rates[arm.name])}
                for arm in self.arms
            },
            "seeds": list(self.seeds),
        }

    def check_same(self, before: Mapping[str, Any], where: str) -> None:
        """Refuse to go on with a comparison of other settings. Arms and seeds may be added.

        Args:
            before: :meth:`identity` of an earlier call.
            where: The file that holds it.

        Raises:
            ConfigError: Names the first setting that differs.
        """
        now = json.loads(json.dumps(self.identity()))
        if isinstance(before.get("run"), Mapping):
            before = {
                **before,
                "run": _with_later_keys(before["run"], now["run"], self.base.written_out(defaults=False)),
            }
        for key in ("run", "ranks", "screen_seed"):
            if told := _difference(before.get(key), now[key], "" if key == "run" else key):
                raise ConfigError(f"{where}: holds a comparison with {told}; choose another --out")
        for name, arm in before.get("arms", {}).items():
            if name not in now["arms"]:
                raise ConfigError(
                    f"{where}: holds a comparison with the arm {name!r}; name it too, or choose another --out"
                )
            if told := _difference(arm, now["arms"][name], ""):
                raise ConfigError(f"{where}: holds a comparison with {told} of arm {name!r}; choose another --out")
        if gone := sorted(set(before.get("seeds", ())) - set(self.seeds)):
            raise ConfigError(f"{where}: holds a comparison with seed {gone[0]}; name it too, or choose another --out")

    def _checked(self, arm: Arm) -> RunConfig:
        config = arm.config(self.file, self.overrides)
        _refuse_choosing(config)
        key = "per_device_eval_batch_size"
        if config.training.get(key) != self.base.training.get(key):
            raise ConfigError(
                f"{arm.where}: training.{key}: does not belong to an arm: held-out loss is a mean over batches of this size"
            )
        ours, theirs = _rows_of_step(self.base), _rows_of_step(config)
        if ours != theirs:
            raise ConfigError(
                f"{arm.where}: {theirs} rows of a rank in a step (per_device_train_batch_size times gradient_accumulation_steps), and "
                f"{ours} without this arm's changes: all arms see the same rows in a step"
            )
        return config

    def _refuse_twins(self) -> None:
        seen: dict[str, str] = {}
        for arm in self.arms:
            settings = json.dumps(_read(self._configs[arm.name]), sort_keys=True)
            if settings in seen:
                raise ConfigError(
                    f"{arm.where}: {arm.name!r} is the same run as {seen[settings]!r}: nothing would be compared"
                )
            seen[settings] = arm.name

    def _overrides_of_arm(self, name: str) -> list[str]:
        return next(arm for arm in self.arms if arm.name == name).overrides()

    def _own(self, run: Run) -> list[str]:
        config = self._configs[run.arm]
        values: dict[str, Any] = {
            "data.eval_part": run.part,
            "training.learning_rate": run.rate,
            "training.seed": run.seed,
        }
        if "seed" in getattr(type(getattr(config, config.method, None)), "model_fields", ()):
            values[f"{config.method}.seed"] = run.seed
        if "statistics" not in config.model_fields_set:  # by default LISA's are measured more often
            values["statistics"] = STATISTICS_STEPS
        if run.stage == "verdict" and "eval_strategy" not in config.training:
            values |= {"training.eval_strategy": "steps", "training.eval_steps": 1 / EVALUATIONS}
        return [override(key, value) for key, value in values.items()]

    def _parameters(self) -> int:
        try:
            return architecture_of(self.base.model).num_parameters
        except ModelError:
            return 0


def _refuse_choosing(config: RunConfig) -> None:
    """Refuse a run that looks at its held-out rows while it trains."""
    for key, chooses in _CHOOSE_BY_HELD_OUT.items():
        if chooses(value := config.training.get(key)):
            raise ConfigError(
                f"{config.where(f'training.{key}')}: a run would choose by the rows that judge it, got {show(value)}; leave it out of a comparison"
            )


def _rows_of_step(config: RunConfig) -> int:
    training = config.training_values()
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


def _dump(config: RunConfig, without: Sequence[str] = (), *, defaults: bool = True) -> dict[str, Any]:
    values = config.written_out(defaults=defaults)
    training = values.get("training", {})
    values["training"] = {key: value for key, value in training.items() if key not in ("output_dir", *without)}
    return values


def _written_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a run, or changes to them, with DeepSpeed's keys in place of the path of their file."""
    path = values.get(_DEEPSPEED)
    return {**values, _DEEPSPEED: read_mapping(path)} if isinstance(path, str) else dict(values)


def _written_out_word(word: str) -> str:
    """The same of ``key=value``."""
    key, _, text = word.partition("=")
    return override(key, _written_out({key: parse_yaml(text)})[key]) if key == _DEEPSPEED else word


def _read(config: RunConfig) -> dict[str, Any]:
    """The settings that the run's method reads: not the sections of other methods."""
    others = METHODS.keys() - {config.method}
    return {key: value for key, value in _dump(config, defaults=False).items() if key not in others}


def _with_later_keys(before: Mapping[str, Any], now: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``before`` with those keys of ``now`` that there were not yet, unless they are ``given`` another value than the default."""
    filled = dict(before)
    for key, value in now.items():
        if key not in filled and key not in given:
            filled[key] = value
        elif isinstance(value, Mapping) and isinstance(filled.get(key), Mapping):
            inner = given.get(key)
            filled[key] = _with_later_keys(filled[key], value, inner if isinstance(inner, Mapping) else {})
    return filled


def _difference(before: Any, now: Any, key: str) -> str:
    """The first setting that differs, as ``key value, not value``; empty if none does."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}):
            inner = f"{key}.{name}" if key else str(name)
            if told := _difference(before.get(name), now.get(name), inner):
                return told
        return ""
    return "" if before == now else f"{key} {show(before)}, not {show(now)}"
