"""Every shipped config loads, and the one that lists all keys lists all keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lisa_ds.config import LisaConfig, RunConfig, load_config
from lisa_ds.config.files import read_mapping
from lisa_ds.train import arguments

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_run_config_is_valid_down_to_its_training_arguments(path: Path) -> None:
    config = load_config(path)
    assert arguments.check(config)
    assert arguments.deepspeed_config(config)["zero_optimization"]["stage"] == 3
    assert LisaConfig.load(path) == config.lisa


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_a_deepspeed_config_goes_with_any_run(path: Path) -> None:
    assert read_mapping(path)["zero_optimization"]["stage"] == 3
    assert arguments.check(load_config(CONFIGS / "demo.yaml", [f"deepspeed={path}"]))


def test_lisa_yaml_has_every_key_at_its_default() -> None:
    written = yaml.safe_load((CONFIGS / "lisa.yaml").read_text())
    assert list(written) == list(RunConfig.model_fields)
    config = load_config(CONFIGS / "lisa.yaml")
    for name in ("model", "data", "lisa"):
        section = getattr(config, name)
        assert list(written[name]) == list(type(section).model_fields)
        for key, field in type(section).model_fields.items():
            if not field.is_required():
                assert getattr(section, key) == field.get_default(call_default_factory=True), f"{name}.{key}"
    assert list(written["lisa"]["sampler"]) == list(type(config.lisa.sampler).model_fields)
    assert list(written["lisa"]["optimizer"]) == list(type(config.lisa.optimizer).model_fields)
