"""An entry of the cache is whole or absent, and built once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lisa_ds.cache import build_once, cache_dir
from lisa_ds.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    return cache_dir()


def test_many_ask_at_once_and_one_builds() -> None:
    built, seen = [], []

    def build(target: Path) -> None:
        built.append(target)
        time.sleep(0.2)
        (target / "file").write_text("whole")

    def ask() -> None:
        seen.append((build_once("a/b", build) / "file").read_text())

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(built) == 1
    assert seen == ["whole"] * 4


def test_a_failed_build_leaves_nothing_and_the_next_starts_afresh(cache: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build_once("entry", fail)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert build_once("entry", lambda target: (target / "file").touch()) == cache / "entry"


def test_what_a_killed_process_left_is_cleared_away(cache: Path) -> None:
    abandoned = cache / ".entry.abandoned"
    abandoned.mkdir(parents=True)
    build_once("entry", lambda target: None)
    assert not abandoned.exists()


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="set LISA_DS_CACHE to a directory that can be written"):
        build_once("entry", lambda target: None)
