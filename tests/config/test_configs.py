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

from lisa_ds import methods
from lisa_ds.cli import main
from lisa_ds.config import (
    DataConfig,
    GaloreConfig,
    GrowthConfig,
    LisaConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    load_config,
)
from lisa_ds.config.files import read_mapping
from lisa_ds.train import arguments

CONFIGS = Path(__file__).parents[2] / "configs"


RECIPES = sorted(CONFIGS.glob("recipes/*.yaml"))


@pytest.mark.parametrize("path", [*sorted(CONFIGS.glob("*.yaml")), *RECIPES], ids=lambda path: path.name)
def test_a_run_config_is_valid_down_to_its_training_arguments(path: Path) -> None:
    config = load_config(path)
    assert arguments.check(config)
    deepspeed, stages = arguments.deepspeed_config(config), methods.of(config).stages
    assert deepspeed["zero_optimization"]["stage"] in stages if stages else deepspeed is None
    assert LisaConfig.load(path) == config.lisa


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("deepspeed", [None, *sorted(CONFIGS.glob("*.json"))], ids=lambda path: path and path.name)
def test_every_other_config_is_planned(path: Path, deepspeed: Path | None, capsys: pytest.CaptureFixture[str]) -> None:
    override = [f"deepspeed={deepspeed}"] if deepspeed else []
    assert main(["plan", "--lisa_config", str(path), "--world-size", "2", "--json", *override]) == 0
    assert json.loads(capsys.readouterr().out)["methods"]["lisa"]["peak"] > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_fits_where_it_says_and_takes_what_it_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text()
    (command,) = re.findall(r"^# lisa-ds (plan .*)$", text, re.MULTILINE)
    assert f"--lisa_config configs/recipes/{path.name} " in command
    assert main([*command.replace(f"configs/recipes/{path.name}", str(path)).split(), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    own = told["methods"][told["run"]["method"]]
    planned = f"# Planned: {own['peak'] / 1e9:.1f} GB on a rank at most, in {own['peak_phase']}. Not measured on a GPU."
    assert planned in text.splitlines()


def test_recipes_cover_the_models_and_machines_they_are_for() -> None:
    names = {path.stem for path in RECIPES}
    for model in ("tinyllama", "llama-2-7b", "llama-3.1-8b"):
        assert {f"{model}-24gb", f"{model}-80gb"} <= names
    assert {"llama-2-70b-4x80gb", "llama-2-70b-2x8x80gb", "llama-3.1-70b-2x8x80gb", "paper-llama-2-7b-4l"} <= names


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_a_deepspeed_config_goes_with_any_run(path: Path) -> None:
    assert read_mapping(path)["zero_optimization"]["stage"] == 3
    assert arguments.check(load_config(CONFIGS / "demo.yaml", [f"deepspeed={path}"]))


def test_lisa_yaml_has_every_key_at_its_default() -> None:
    written = yaml.safe_load((CONFIGS / "lisa.yaml").read_text())
    assert list(written) == list(RunConfig.model_fields)
    config = load_config(CONFIGS / "lisa.yaml")
    for name in ("model", "data", "lisa", "lora", "galore"):
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


@pytest.mark.parametrize(
    "section",
    [
        *(ModelConfig, DataConfig, LisaConfig, SamplerConfig, GrowthConfig, OptimizerConfig),
        *(LoraConfig, GaloreConfig, RunConfig),
    ],
)
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
