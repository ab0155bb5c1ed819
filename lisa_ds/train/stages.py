"""What a run is doing while it prints nothing else: a line before everything that takes long."""

from __future__ import annotations

import os


def begin(what: str) -> None:
    """Say that ``what`` begins, on rank 0; loads nothing."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{what} ...", flush=True)
