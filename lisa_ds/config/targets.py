"""Which linears a method works on, as its section says: all, by name, or by a regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lisa_ds.config.base import mistake
from lisa_ds.errors import ConfigError

ALL_LINEAR = "all-linear"
"""All linears but the model's head."""

Targets = str | list[str]


def checked(value: Any) -> Any:
    """Check ``targets`` of a section: text, or a list of names that is not empty."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise mistake(f"is no regular expression: {error}") from None
        if not value:
            raise mistake(f"should be '{ALL_LINEAR}', names, or a regular expression")
        return value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise mistake(f"should be '{ALL_LINEAR}', a list of names, or a regular expression")
    return value


def chosen(wanted: Targets, path: str, *, inside: bool) -> bool:
    """Whether ``targets`` names a linear; ``all-linear`` names all.

    Args:
        wanted: The section's value.
        path: Of the module, such as ``model.layers.3.self_attn.q_proj``.
        inside: Whether a name of a list may also stand inside the path, as GaLore has it; else it is its end, as PEFT has it.

    Example:
        >>> chosen(["attn"], "model.layers.3.self_attn.q_proj", inside=True), chosen(["q_proj"], "a.q_proj", inside=False)
        (True, True)
    """
    if wanted == ALL_LINEAR:
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") or (inside and name in path) for name in wanted)


def name_nothing(where: str, model: str, wanted: Targets, paths: Iterable[str]) -> ConfigError:
    """The error of ``targets`` that name no linear.

    Args:
        where: File and key.
        model: Its name.
        wanted: The section's value.
        paths: Of the linears that there are.
    """
    called = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return ConfigError(
        f"{where}: names no linear of {model!r}, got {wanted!r}; its linears are called {called or 'nothing: there are none'}"
    )
