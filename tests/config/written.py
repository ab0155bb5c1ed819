"""A config file in the working directory, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lisa_ds.errors import ConfigError

RUN = "model: {name_or_path: some/model}\ndata: {path: rows.jsonl}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `run.yaml` in the working directory, so that messages can be compared as they are."""
    monkeypatch.chdir(tmp_path)
    path = Path("run.yaml")
    path.touch()
    return path


def mistakes(call: Any, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value).splitlines()
