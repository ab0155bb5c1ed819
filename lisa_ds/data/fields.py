"""The fields of a row or a turn: each is read, refused by name, or reported at the end as not used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lisa_ds.errors import DataError


@dataclass
class Unused:
    """Counts of what was not used: rows with a column, turns with a field, rows with a placeholder."""

    columns: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)

    def told(self) -> list[str]:
        """In words, such as ``columns not used: 'id' (1,200 rows), 'source' (3 rows)``."""
        kinds = (
            ("columns not used", "row", self.columns),
            ("fields of turns not used", "turn", self.turns),
            (
                "learned as plain text, though it stands for something else in the data of others",
                "row",
                self.placeholders,
            ),
        )
        return [
            f"{what}: " + ", ".join(f"{name!r} ({n:,} {unit}{'s' * (n > 1)})" for name, n in counts.most_common())
            for what, unit, counts in kinds
            if counts
        ]


class Fields:
    """The fields of a row, or of a part of one, and which of them were read.

    Args:
        values: As they were found.
        place: File and line.
        path: Where in the row, such as ``messages[0]``; empty for the row itself.
    """

    def __init__(self, values: Mapping[str, Any], place: str, path: str = "") -> None:
        self.values = values
        self.place = place
        self.path = path
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str) -> Any:
        """The value, or None if there is none; the field then counts as read."""
        self._read.add(name)
        return self.values.get(name)

    def part(self, name: str, value: Any, expected: str = "an object") -> Fields:
        """The fields of an object inside this one.

        Raises:
            DataError: It is no object.
        """
        if not isinstance(value, Mapping):
            raise self.wrong(name, expected, value)
        return Fields(value, self.place, self.at(name))

    def text(self, name: str, *, optional: bool = False) -> str:
        """The value, which must be text; empty if it is optional and missing."""
        value = self.take(name)
        if optional and value is None:
            return ""
        if not isinstance(value, str):
            raise self.wrong(name, "text", value)
        return self.encodable(name, value)

    def encodable(self, name: str, text: str) -> str:
        r"""Refuse half of a surrogate pair: JSON may hold ``\ud83d``, but no tokenizer takes it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.wrong(name, f"valid Unicode (character {error.start + 1} is half of a pair)", text) from None
        return text

    def rest(self) -> Iterator[tuple[str, Any]]:
        """The fields that were not read and are not empty."""
        for name, value in self.values.items():
            if name not in self._read and says_something(value):
                yield name, value

    def says(self, name: str) -> bool:
        """Whether the field is there and not empty, see :func:`says_something`."""
        return says_something(self.values.get(name))

    def at(self, name: str) -> str:
        """The full name of a field."""
        return f"{self.path}.{name}" if self.path else name

    def wrong(self, name: str, expected: str, value: object) -> DataError:
        """The error about a wrong value."""
        return DataError(f"{self.place}: {self.at(name)} should be {expected}, got {shown(value)}")

    def refused(self, name: str, why: str) -> DataError:
        """The error about a field that other tools honour and this package cannot."""
        return DataError(f"{self.place}: {self.at(name)} {why}")


def says_something(value: object) -> bool:
    """Whether a value is more than null, NaN, a blank text, or a list or an object of such."""
    if isinstance(value, (str, bytes)):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(says_something, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(says_something, value))
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def shown(value: object) -> str:
    """A value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Collection[str]) -> str:
    """Names of columns, for a message."""
    return ", ".join(map(repr, names)) if names else "no columns"
