"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_ds.files import whole


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new/file.txt"
    with whole(target) as unfinished:
        unfinished.write_text("1")
        assert not target.exists()
    assert target.read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def cut_short() -> None:
        with whole(target) as unfinished:
            unfinished.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cut_short()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_is_added_to_what_a_killed_process_left(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with whole(target) as unfinished:
        unfinished.write_text("1")
    unfinished.write_text("left")
    with whole(target) as unfinished, unfinished.open("a") as file:
        file.write("2")
    assert target.read_text() == "2"
