"""A strict JSON parser for data files: a mistake has one position, and no object may have a key twice."""

from __future__ import annotations

import json
from typing import Any

from lisa_ds.config import places


class NotJSON(ValueError):
    """What is wrong, without a file or line; ``position`` is the index of the character, if that is known."""

    def __init__(self, reason: str, position: int | None = None) -> None:
        super().__init__(reason)
        self.position = position


def parse(text: str) -> Any:
    """The value that a text holds. NaN and Infinity are read, as Python and pandas write them.

    Raises:
        NotJSON: It is malformed, an object has a key twice, it is nested too deeply, or a number has too many digits.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise NotJSON(error.msg, places.of_json(error)) from None
    except RecursionError:
        raise NotJSON("nested too deeply") from None
    except ValueError as error:
        if isinstance(error, NotJSON):
            raise
        raise NotJSON("a number has too many digits") from None  # Python converts at most 4300


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise NotJSON(f"the key {twice!r} is there twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
