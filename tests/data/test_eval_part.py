"""``data.eval_part``: two halves of the held-out rows that have no row in common, and are together all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset, preview
from lisa_ds.data.build import Part
from lisa_ds.errors import ConfigError, DataError
from lisa_ds.evidence import PARTS
from tests.data.chatml import PAIRS, bpe, tokenizer, write
from tests.data.rows import fresh_cache

__all__ = ["bpe", "fresh_cache", "tokenizer"]


def held_out(tokenizer: Any, **options: Any) -> list[str]:
    _, rows = load_dataset(DataConfig(**options), tokenizer)
    assert rows is not None
    return [preview(row, tokenizer) for row in rows]


@pytest.mark.parametrize("held", ["eval_fraction", "eval_path", "eval_split"])
def test_halves_are_disjoint_and_together_all(held: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows").mkdir()
    path = write(tmp_path / "rows/train.jsonl", *PAIRS)
    other = write(tmp_path / "rows/test.jsonl", *({"prompt": f"new {i}", "completion": "a"} for i in range(11)))
    options: dict[str, Any] = {
        "eval_fraction": {"path": path, "eval_fraction": 0.4},
        "eval_path": {"path": path, "eval_path": other},
        "eval_split": {"path": str(tmp_path / "rows"), "eval_split": "test"},
    }[held]
    whole, select, verdict = (held_out(tokenizer, **options, eval_part=part) for part in ("all", "select", "verdict"))
    assert whole == held_out(tokenizer, **options)
    assert not set(select) & set(verdict)
    assert sorted(select + verdict) == sorted(whole)
    assert abs(len(select) - len(verdict)) <= 1
    fewer = held_out(tokenizer, **options, eval_part="verdict", eval_max_rows=2)
    assert set(fewer) <= set(verdict)
    assert len(fewer) == 2
    again = held_out(tokenizer, **options, eval_part="select", seed=1)
    assert set(again) != set(select)  # data.seed draws the halves


def test_the_training_rows_stay_the_same(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *PAIRS)
    trained = [load_dataset(DataConfig(path=path, eval_fraction=0.4, eval_part=part), tokenizer)[0] for part in ("all", "select", "verdict")]  # fmt: skip
    assert trained[0][:] == trained[1][:] == trained[2][:]


def test_another_host_cuts_the_same_halves(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"path": write(tmp_path / "rows.jsonl", *PAIRS), "eval_fraction": 0.4}
    here = held_out(tokenizer, **options, eval_part="select")
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "of another host"))
    assert held_out(tokenizer, **options, eval_part="select") == here
    assert (tmp_path / "of another host/data").is_dir()


def test_a_row_and_its_double_are_in_one_half() -> None:
    hashes = np.array([0.1, 0.2, 0.2, 0.2, 0.2, 0.3])
    halves = [Part(half=half).choose(hashes).tolist() for half in PARTS]
    assert halves == [[0], [1, 2, 3, 4, 5]]


def test_halves_that_cannot_be_cut(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        _load()
    assert str(caught.value) == (
        "run.yaml: data: eval_part 'select' is a half of the held-out rows, and there are none; set eval_fraction, eval_split or "
        "eval_path"
    )
    path = write(tmp_path / "rows.jsonl", *PAIRS[:3])
    one = write(tmp_path / "one.jsonl", *[PAIRS[5]] * 3)
    with pytest.raises(DataError) as few:
        load_dataset(DataConfig(path=path, eval_path=one, eval_part="select"), tokenizer)
    assert str(few.value) == (
        f"{one}: data.eval_part 'select' is left without a row, of 3 held out; hold out more rows that differ"
    )


def _load() -> None:
    from lisa_ds.config.base import Origin, validate
    from lisa_ds.config.run import RunConfig

    fields = {"model": {"name_or_path": "x"}, "data": {"path": "x", "eval_part": "select"}}
    validate(RunConfig, fields, Origin("run.yaml"))
