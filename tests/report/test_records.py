"""Records survive the file, and a file that holds something else is told by line."""

from __future__ import annotations

import dataclasses
import math
import subprocess
from pathlib import Path

import pytest

from lisa_ds import records
from lisa_ds.errors import DataError
from lisa_ds.records import Record

RECORD = Record(
    name="switch_time", variant="lisa", value=1.5, unit="ms", device="CPU", commit="abc", versions={"torch": "2"},
    low=1.0, high=2.0, n=9, x=2.0, x_label="sampled layers", settings={"seed": 0},
)  # fmt: skip


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results" / "switch.jsonl"
    other = dataclasses.replace(RECORD, variant="full", x=None, settings={})
    records.append(path, RECORD)
    records.append(path, other)
    assert list(records.read(path)) == [RECORD, other]


def test_a_number_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.append(tmp_path / "r.jsonl", dataclasses.replace(RECORD, value=math.nan))
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"name": "x"', "not a record"),
        ('{"name": "x"}', "missing"),
        ("[]", "not a record"),
        ('{"nom": 1}', "unknown field nom"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, RECORD)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"r.jsonl:2: .*{message}"):
        list(records.read(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: no records can be read"):
        list(records.read(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("samples", [[], [1.0, math.inf]])
def test_spread_refuses_what_has_no_median(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="finite samples"):
        records.spread(samples)


def test_spread_of_one_sample_has_no_width() -> None:
    assert records.spread([2.0]) == records.Spread(2.0, 2.0, 2.0, 1)


def test_versions_leave_out_what_is_not_installed() -> None:
    found = records.versions(("pydantic", "no-such-package"))
    assert set(found) == {"python", "pydantic"}


def test_commit_is_git_s_own_or_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(records.__file__).parent.parent
    if (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
        assert head.startswith(records.commit().removesuffix("-dirty"))
    monkeypatch.setattr(records, "__file__", str(tmp_path / "lisa_ds" / "records.py"))
    assert records.commit() == "unknown"
