"""Progress messages of a run: a line before everything that takes long."""

from __future__ import annotations

import os


def begin(what: str) -> None:
    """Print on rank 0 that ``what`` begins; imports nothing heavy."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{what} ...", flush=True)
