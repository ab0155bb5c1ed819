"""Which cases of a test are in the short run; the others are in ``make test-more``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def shortened(values: Iterable[Any], *kept: Any) -> list[Any]:
    """``values`` as parameters, marked ``more`` but for those that are ``kept``, which are named by their ``name`` if they have one."""
    found, marked = set(), []
    for value in values:
        name = (
            tuple(getattr(v, "name", v) for v in value) if isinstance(value, tuple) else getattr(value, "name", value)
        )
        found.add(name)
        parts = value if isinstance(value, tuple) else (value,)
        marked.append(pytest.param(*parts, marks=[] if name in kept else [pytest.mark.more]))
    if unknown := set(kept) - found:
        raise ValueError(f"there is no {sorted(unknown, key=str)} to keep")
    return marked
