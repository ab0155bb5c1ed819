"""Refuses keys of a DeepSpeed config that DeepSpeed does not read: it reads the config once, and look-ups are recorded.

Note on unread keys.
    DeepSpeed refuses unknown keys in the sections for which it has pydantic classes, ``zero_optimization`` among them, and
    silently ignores all others: a misspelt ``gradient_clipping`` trains unclipped. The valid keys differ by release, so no
    list is kept here: DeepSpeed itself reads the config once, through a dict that records which keys are looked up.
"""

from __future__ import annotations

import difflib
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from lisa_ds.config.base import show
from lisa_ds.errors import ConfigError

# Known when the ranks are: replaced by values that always fit.
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# Read by deepspeed.initialize before it makes a config of them, and by us.
_READ_ELSEWHERE = frozenset((*_BATCH, "mesh_param", "sequence_parallel_size", "data_parallel_size"))

# What they hold goes to the constructor of an optimizer or a scheduler, which knows its own arguments.
_PASSED_ON = frozenset(("optimizer.params", "scheduler.params"))

_NOTES = ("_", "#", "/", "$")
"""First characters of keys that are comments, as JSON has none: ``_comment``."""


def read(fields: Mapping[str, Any], source: str) -> DeepSpeedConfig:
    """Have DeepSpeed read a config as when it builds an engine, without values that are known only then.

    Args:
        fields: The config; values that are ``auto`` are left out.
        source: What messages call it.

    Raises:
        ConfigError: Values that DeepSpeed does not take, or keys that it does not read, one a line.
    """
    known = _without_auto(fields)
    zero = known.get("zero_optimization")
    try:
        if isinstance(zero, Mapping):
            DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{source}: zero_optimization.{'.'.join(map(str, problem['loc']))}: DeepSpeed says: {problem['msg']}, "
                f"got {show(problem['input'])}"
                for problem in error.errors()
            )
        ) from None
    asked = _Asked({**known, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    dict.pop(asked, "train_batch_size", None)
    try:
        config = DeepSpeedConfig(asked)
    except Exception as error:  # whatever it is, it is this config's
        problems = error.errors() if isinstance(error, ValidationError) else [{"msg": str(error) or repr(error)}]
        said = "; ".join(
            " ".join(str(part) for part in (*problem.get("loc", ()), problem["msg"])) for problem in problems
        )
        raise ConfigError(f"{source}: DeepSpeed cannot read it: {' '.join(said.split())}") from None
    if unread := [f"{source}: {path}: {_remedy(key, near)}" for path, key, near in _unread(asked)]:
        raise ConfigError("\n".join(unread))
    return config


class _Asked(dict[Any, Any]):
    """A dict that records which of its keys are looked up; iterating over it counts as looking up all."""

    def __init__(self, fields: Mapping[Any, Any]) -> None:
        super().__init__({key: _Asked(value) if isinstance(value, Mapping) else value for key, value in fields.items()})
        self.asked: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self.asked.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[Any]:
        self.asked.update(self.own())
        return super().__iter__()

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __copy__(self) -> _Asked:
        return self

    def own(self) -> list[Any]:
        """The keys, without recording a look-up."""
        return list(super().keys())

    def held(self, key: Any) -> Any:
        """A value, without recording a look-up."""
        return super().get(key)


def _unread(section: _Asked, path: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Dotted path and name of each key that was not looked up, and the names looked up that resemble it."""
    if path and (not section.asked or section.held("enabled") is False):
        return  # passed on as a whole, or turned off
    for key in section.own():
        at = f"{path}{key}"
        if key in section.asked or at in _READ_ELSEWHERE:
            value = section.held(key)
            if isinstance(value, _Asked) and at not in _PASSED_ON:
                yield from _unread(value, f"{at}.")
        elif not str(key).startswith(_NOTES) and key != "comment":
            names = [str(name) for name in section.asked] + ([] if path else list(_READ_ELSEWHERE))
            yield at, str(key), difflib.get_close_matches(str(key), sorted(names), n=1)


def _remedy(key: str, near: list[str]) -> str:
    of_zero = {name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias)}
    if key in of_zero:
        remedy = "it belongs in 'zero_optimization'"
    else:
        remedy = f"did you mean {near[0]!r}?" if near else "remove it"
    return f"DeepSpeed {deepspeed.__version__} does not read this key; {remedy}"


def _without_auto(value: Any) -> Any:
    """``value`` without the keys that transformers is to fill in."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
