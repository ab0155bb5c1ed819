"""Every shipped config loads, and the one that lists all keys lists all keys."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from lisa_ds.config import DataConfig, LisaConfig, ModelConfig, OptimizerConfig, RunConfig, SamplerConfig, load_config
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
    ours = {"output_dir", "logging_steps"}
    defaults = {field.name: field.default for field in fields(TrainingArguments) if field.default is not MISSING}
    for key, value in config.training.items():
        assert key in ours or value == (defaults[key] or value), f"training.{key}"


@pytest.mark.parametrize("section", [ModelConfig, DataConfig, LisaConfig, SamplerConfig, OptimizerConfig, RunConfig])
def test_the_reference_in_the_docs_is_that_of_the_code(section: Any) -> None:
    written = (CONFIGS.parent / "docs/config.md").read_text()
    for row in rows(section):
        assert row in written, f"docs/config.md lacks the line\n{row}"


def rows(section: Any) -> list[str]:
    """Lines of the table of a section: key, default, meaning."""
    lines = []
    for key, field in section.model_fields.items():
        nested = isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
        default = (
            "" if field.is_required() or nested else f"`{json.dumps(field.get_default(call_default_factory=True))}`"
        )
        meaning = re.sub(r"``([^`]*)``", r"`\1`", " ".join(str(field.description).split()))
        lines.append(f"| `{key}` | {default or ('required' if field.is_required() else 'keys below')} | {meaning} |")
    return lines
