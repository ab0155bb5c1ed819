"""The variants of a run that are compared: the names of methods, or a file of overrides by name."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_ds.config import RunConfig, load_config
from lisa_ds.config.base import show
from lisa_ds.config.files import read_mapping
from lisa_ds.config.stages import ZERO_STAGES
from lisa_ds.errors import ConfigError

RATES = "rates"
"""The key of an arm that is not one of a run: the learning rates it tries."""

_SAME_FOR_ALL = {
    "training.output_dir": "each run has a directory of its own in --out",
    "training.seed": "--seeds says which",
    "training.data_seed": "rows come in the order of --seeds",
    "training.learning_rate": f"the learning rates that an arm tries are its {RATES}",
    "data": "all arms see the same rows",
    "model.name_or_path": "all arms train the same model",
}
"""Keys that no arm may set, and why."""


@dataclass(frozen=True)
class Arm:
    """One variant."""

    name: str
    changes: Mapping[str, Any]
    """Values by dotted key, put over the run's file; of :func:`read`, with no DeepSpeed for a method that runs without."""

    rates: tuple[float, ...] = ()
    """Learning rates to try; empty if they were not given."""

    where: str = ""
    """As messages about it begin."""

    def overrides(self) -> list[str]:
        """Its changes as ``key=value``."""
        return [override(key, value) for key, value in self.changes.items()]

    def config(self, file: str, overrides: Sequence[str]) -> RunConfig:
        """The run's config with the arm's changes.

        Args:
            file: Of the run.
            overrides: Of the command line, correct by themselves.

        Raises:
            ConfigError: The arm's changes do not make a run; the message names file, arm and key.
        """
        return load_config(file, overrides, {self.where: self.overrides()})


def override(key: str, value: Any) -> str:
    """``key=value`` as the command line takes it."""
    return f"{key}={json.dumps(value)}"  # JSON is YAML


def read(methods: Sequence[str], file: Path | None) -> list[Arm]:
    """The arms, those of ``methods`` first.

    Args:
        methods: Names of methods, each an arm of that name.
        file: YAML or JSON: by the name of an arm, keys of a run file with dots, and ``rates``.

    Raises:
        ConfigError: There are fewer than two, or a name is given twice, or an arm sets what is the same for all.
    """
    arms = [Arm(name, _completed({"method": name}), where="--methods") for name in methods]
    arms += [] if file is None else _of_file(file)
    names = [arm.name for arm in arms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"compare: the arm {twice!r} is given twice")
    if len(arms) < 2:
        raise ConfigError("compare: takes two arms or more; name them by --methods full,lisa or by --arms FILE")
    return arms


def _completed(changes: dict[str, Any]) -> dict[str, Any]:
    """With no DeepSpeed for a method that runs without, unless the arm says something of it."""
    method = changes.get("method")
    alone = isinstance(method, str) and ZERO_STAGES.get(method) == ()
    if not alone or any(key.partition(".")[0] == "deepspeed" for key in changes):
        return changes
    return {**changes, "deepspeed": None}


def _of_file(file: Path) -> Iterator[Arm]:
    for name, given in read_mapping(file).items():
        where = f"{file}: {name}"
        if not name.strip() or not name.isprintable() or "|" in name:
            raise ConfigError(f"{file}: {name!r}: the name of an arm should be text without | and line breaks")
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise ConfigError(f"{where}: should hold keys of a run, such as {{method: lisa}}, got {show(given)}")
        changes = {key: value for key, value in given.items() if key != RATES}
        for key in changes:
            _check_key(key, where)
        yield Arm(name, _completed(changes), _rates(given.get(RATES), where) if RATES in given else (), where)


def _check_key(key: str, where: str) -> None:
    why = next((why for same, why in _SAME_FOR_ALL.items() if f"{key}.".startswith(f"{same}.")), None)
    if why is None and key.endswith(".seed"):
        why = _SAME_FOR_ALL["training.seed"]
    if why is None and key in ("training", "model"):
        why = "write its keys with dots, such as training.weight_decay"
    if why is not None:
        raise ConfigError(f"{where}: {key}: does not belong to an arm: {why}")
    if near := difflib.get_close_matches(key, [RATES], n=1, cutoff=0.75):
        raise ConfigError(f"{where}: {key}: unknown key; did you mean {near[0]!r}?")


def _rates(given: Any, where: str) -> tuple[float, ...]:
    numbers = given if isinstance(given, list) else [given]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ConfigError(f"{where}: {RATES}: should be a list of learning rates above 0, got {show(given)}")
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{where}: {RATES}: should be a list of different learning rates, got {show(given)}")
    return tuple(sorted(map(float, numbers)))
