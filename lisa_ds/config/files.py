"""YAML and JSON, without their traps: a number is a number, and a key given twice is a mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lisa_ds.errors import ConfigError


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file.

    Raises:
        ConfigError: The file is missing, is not what its name says, or does not hold keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
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
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML text; ``1e-5`` is a number here, while YAML 1.1 and so PyYAML take it for a string.

    Raises:
        ValueError: With line and column, or the key that is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark else ""
        column = f" (column {mark.column + 1})" if mark else ""
        raise ValueError(f"{line}not valid YAML: {error.problem}{column}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in written:
            if written.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
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
            raise ValueError(f"key {key!r} is given twice")
    return dict(pairs)
