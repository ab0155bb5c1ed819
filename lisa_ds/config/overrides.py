"""``key=value`` put over what a file says, and where each of them was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lisa_ds.config.base import Origin, show
from lisa_ds.config.files import parse_yaml, read_mapping
from lisa_ds.config.lisa import rename_aliases
from lisa_ds.config.sampler import named

COMMAND_LINE = "command line"
"""What messages call the place of what was typed."""


def override(
    fields: dict[str, Any], overrides: Mapping[str, Sequence[str]], origin: Origin, problems: list[str]
) -> Origin:
    """Set dotted keys of ``fields``.

    Args:
        fields: A run's sections.
        overrides: ``key=value`` by what messages call their place, later ones over earlier ones; values are YAML.
        origin: Where ``fields`` were read.
        problems: Is added to by each mistake.

    Returns:
        The origin of what ``fields`` are now.
    """
    overridden: dict[str, str] = {}
    added: dict[str, str] = {}
    for place, words in overrides.items():
        for word in words:
            dotted, _, text = word.partition("=")
            parts = dotted.split(".")
            if "=" not in word or not all(parts):
                problems.append(f"{place}: should be key=value with a dotted key, got {show(word)}")
                continue
            if parts[0] == "lisa" and len(parts) == 2:
                parts = ["lisa", *rename_aliases({parts[1]: None}, Origin(place, "lisa"), problems)]
            try:
                value = parse_yaml(text)
            except ValueError as error:
                problems.append(f"{place}: {dotted}: {error}, got {show(text)}")
                continue
            try:
                sections = _put(_written_out(fields, parts), parts, value)
            except ValueError as error:
                problems.append(f"{place}: {dotted}: {error}")
                continue
            added |= dict.fromkeys(sections, place)
            overridden = {key: before for key, before in overridden.items() if key != ".".join(parts)}
            overridden[".".join(parts)] = place  # the last of those that set a part of a section names its place
    return replace(origin, overridden=overridden, added=added)


def _written_out(fields: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """``fields`` with a section's short form (a name, a file's path) written out, if a key of it is to be set."""
    lisa = fields.get("lisa")
    if parts[0] == "deepspeed" and len(parts) > 1 and isinstance(fields.get("deepspeed"), str):
        fields["deepspeed"] = read_mapping(fields["deepspeed"])
    if parts[0] == "lisa" and len(parts) > 2 and parts[1] in ("sampler", "optimizer") and isinstance(lisa, dict):
        lisa[parts[1]] = named(lisa.get(parts[1]))
    return fields


def _put(fields: dict[str, Any], parts: list[str], value: Any) -> set[str]:
    """Set a dotted key and return the sections that had to be added for it.

    Raises:
        ValueError: A part of the key is no section.
    """
    *sections, key = parts
    added = set()
    for depth, part in enumerate(sections, start=1):
        section = ".".join(sections[:depth])
        if fields.get(part) is None:
            fields[part] = {}
            added.add(section)
        inner = fields[part]
        if not isinstance(inner, dict):
            raise ValueError(f"{section} is {show(inner)}, which has no keys to set; override it as a whole")
        fields = inner
    fields[key] = value
    return added
