"""Overrides from several places: which of them holds, and which a message blames."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_ds.config import load_config
from lisa_ds.config.stages import ZERO_STAGES
from lisa_ds.errors import ConfigError
from lisa_ds.memory import METHODS

ARM = "arms.yaml: B"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: m}\ndata: {path: d}\nlisa: {interval_steps: 3}\n")
    return file


def test_each_key_names_the_place_that_set_it_last(file: Path) -> None:
    typed = ["lisa.num_sampled_layers=1", "training.max_steps=5", "deepspeed.zero_optimization.stage=3"]
    config = load_config(file, typed, {ARM: ["lisa.num_sampled_layers=4", "deepspeed=null", "lora.rank=2"]})
    assert (config.lisa.num_sampled_layers, config.deepspeed, config.lora.rank) == (4, None, 2)
    for key, place in {
        "lisa.interval_steps": str(file),
        "training.max_steps": "command line",
        "lisa.num_sampled_layers": ARM,
        "deepspeed.zero_optimization": ARM,
        "lora.rank": ARM,
        "lora": ARM,  # which is there only because of it
    }.items():
        assert config.where(key) == f"{place}: {key}"


def test_a_mistake_is_blamed_on_its_place(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(file, ["lisa.sed=3", "lisa"], {ARM: ["lora.rank=0"], "C": ["model.name_or_path.x=1"]})
    assert str(refused.value).splitlines() == [
        "command line: should be key=value with a dotted key, got 'lisa'",
        "C: model.name_or_path.x: model.name_or_path is 'm', which has no keys to set; override it as a whole",
        "command line: lisa.sed: unknown key, got 3; did you mean 'lisa.seed'?",
        "arms.yaml: B: lora.rank: should be greater than or equal to 1, got 0",
    ]


def test_every_method_has_its_stages() -> None:
    assert ZERO_STAGES.keys() == METHODS.keys()
