"""YAML and JSON, without their traps: a number is a number, and a key given twice is a mistake."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lisa_ds.config import places
from lisa_ds.errors import ConfigError

TOO_DEEP = "is nested too deeply or refers to itself"
_DEEPEST, _MOST_VALUES = 50, 100_000


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file.

    Raises:
        ConfigError: The file is missing, is not what its name says, or does not hold keys.
    """
    if stat.S_ISCHR(_mode(path)) or stat.S_ISBLK(_mode(path)):
        raise ConfigError(f"{path}: is a device, not a file of keys and values")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a name that no file can have
        raise ConfigError(f"{_printable(path)}: cannot be read as text: {error}") from None
    try:
        fields = parse_json(text) if Path(path).suffix == ".json" else parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise ConfigError(f"{path}: should hold keys and values, got {type(fields).__name__}")
    return fields


def parse_json(text: str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: With line and column, or the key that is given twice.
    """
    try:
        return _unfolded(json.loads(text, object_pairs_hook=_unique))
    except json.JSONDecodeError as error:
        line, column = places.line_and_column(text, places.of_json(error))
        raise ValueError(f"line {line}: not valid JSON: {error.msg} (column {column})") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except _GivenTwice as error:
        if (position := places.of_key_given_twice(text)) is None:
            raise
        line, column = places.line_and_column(text, position)
        raise ValueError(f"line {line}: {error} (column {column})") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML text; ``1e-5`` is a number here, while YAML 1.1 and so PyYAML take it for a string.

    Raises:
        ValueError: With line and column, or the key that is given twice.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(places.of_yaml(error)) from None
    except yaml.reader.ReaderError as error:
        line, column = places.line_and_column(text, error.position)
        what = f"a character that no text holds, {chr(error.character)!r}"
        raise ValueError(f"line {line}: not valid YAML: {what} (column {column})") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # a number of thousands of digits, or a tag such as !!timestamp on something else
        raise ValueError(f"not valid YAML: a value does not fit its type: {error}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return _unfolded(value)


def _unfolded(value: Any) -> Any:
    """``value`` unchanged, if it can be traversed: YAML aliases may make a few lines endless, or nearly so.

    Raises:
        ValueError: It cannot.
    """
    count, left = 0, [(0, value)]
    while left:
        depth, each = left.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST_VALUES:
            raise ValueError(TOO_DEEP)
        if isinstance(each, (dict, list)):
            left += [(depth + 1, inner) for inner in (each.values() if isinstance(each, dict) else each)]
    return value


def _mode(path: str | Path) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return 0


def _printable(path: str | Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        written: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in written:
                    what = f"key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                written.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _GivenTwice(f"key {key!r} is given twice")
    return dict(pairs)


class _GivenTwice(ValueError):
    pass
