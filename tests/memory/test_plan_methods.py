"""Methods beside each other in a plan: each planned as its own run would be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from lisa_ds.config import ModelConfig, RunConfig, load_config, model_alone
from lisa_ds.errors import ConfigError
from lisa_ds.memory import METHODS, Architecture, RunSettings, advice, catalogue, forecast, settings
from lisa_ds.report import plan


def run_of(folder: Path, *overrides: str, types: dict[str, str] | None = None) -> Any:
    """What the planner reads of a run of GPT-2 in bf16 on two ranks, with a bucket that does not depend on the method."""
    fields = {
        "model": {"name_or_path": "gpt2"},
        "data": {"path": "rows.jsonl"},
        "training": {"bf16": True},
        "deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1e6}, "data_types": types or {}},
    }
    (folder / "run.json").write_text(json.dumps(fields))
    config = load_config(folder / "run.json", overrides)
    return settings.from_run(config, settings.architecture_of(config.model), num_ranks=2)


GPT2 = Architecture.from_config(catalogue.require("gpt2"))
TYPES = [({}, 4, 2), ({"grad_accum_dtype": "bf16"}, 2, 2), ({"grad_accum_dtype": "float"}, 4, 4)]


@pytest.mark.parametrize(("types", "of_lisa", "of_full"), TYPES)
def test_gradients_are_planned_in_the_type_that_each_method_adds_them_up_in(
    tmp_path: Path, types: dict[str, str], of_lisa: int, of_full: int
) -> None:
    """DeepSpeed by itself adds 16-bit gradients up in 16 bits: a plan of LISA does not count more for full fine-tuning."""
    many = "training.gradient_accumulation_steps=4"
    lisa, full = (run_of(tmp_path, many, f"method={method}", types=types) for method in ("lisa", "full"))
    assert (lisa.gradient_width, full.gradient_width) == (of_lisa, of_full)
    beside = plan.make("gpt2", GPT2, lisa, None).forecasts
    assert beside["lisa"] == forecast(GPT2, lisa)
    assert beside["full"] == forecast(GPT2, full)
    assert beside["full"].phases["step"]["gradients"] == of_full * sum(-(-n // 2) for n in GPT2.shape.all())


@pytest.mark.parametrize(("types", "of_lisa", "of_full"), TYPES)
@pytest.mark.parametrize("method", ["lisa", "full"])
def test_advice_to_accumulate_is_planned_in_the_type_that_it_leads_to(
    tmp_path: Path, types: dict[str, str], of_lisa: int, of_full: int, method: str
) -> None:
    run = run_of(tmp_path, f"method={method}", "training.per_device_train_batch_size=8", types=types)
    advised = advice.changes(GPT2, run, 10**9)
    (place,) = [i for i, change in enumerate(advised) if "gradient_accumulation_steps=8" in change.write]
    written = [part for change in advised[: place + 1] for part in change.write.split()]
    as_written = run_of(tmp_path, f"method={method}", *written, types=types)
    assert as_written.gradient_width == {"lisa": of_lisa, "full": of_full}[method]
    assert forecast(GPT2, as_written).peak == advised[place].peak
    assert replace(run, accumulation=8).gradient_width == as_written.gradient_width


def test_every_method_is_an_object_of_one_table() -> None:
    assert [(name, method.name, method.title) for name, method in METHODS.items()] == [
        (name, name, title)
        for name, title in (("lisa", "LISA"), ("full", "full"), ("lora", "LoRA"), ("galore", "GaLore"))
    ]
    assert set(get_args(RunConfig.model_fields["method"].annotation)) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_what_stays_at_least_is_in_every_phase_of_a_step(name: str) -> None:
    """Of a model whose architecture is not known, only that is asked for: it may not refuse what would fit."""
    run = RunSettings(2, 1, 128, method=name, bucket_size=0)
    planned = forecast(GPT2, run)
    least = METHODS[name].least(GPT2.shape, run)
    assert run.width * sum(-(-n // (2 if METHODS[name].shards else 1)) for n in GPT2.shape.all()) <= least
    assert least <= sum(planned.phases["forward"].values())


def test_what_stays_at_least_counts_gradients_in_the_type_that_they_are_added_up_in() -> None:
    once = RunSettings(2, 1, 128)
    elements = forecast(GPT2, once).phases["step"]["gradients"] // 2
    for method, more in (("lisa", 2 * elements), ("full", 0)):
        one, four = (METHODS[method].least(GPT2.shape, replace(once, method=method, accumulation=n)) for n in (1, 4))
        assert four - one == more


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("lora", "lora.targets=[wq]", "command line: lora.targets: names no linear of 'gpt2', got ['wq']; its linears are called c_attn, "),
        ("galore", "galore.targets=[wq]", "command line: galore.targets: names no linear of 'gpt2', got ['wq']; its linears are called nothing: there are none"),
    ],
)  # fmt: skip
def test_targets_that_name_nothing_are_refused_where_the_method_is_planned(
    method: str, override: str, message: str
) -> None:
    architecture = settings.architecture_of(ModelConfig(name_or_path="gpt2"))
    with pytest.raises(ConfigError) as caught:
        settings.from_run(model_alone("gpt2", [f"method={method}", override]), architecture, num_ranks=2)
    assert str(caught.value).startswith(message)
    beside = settings.from_run(model_alone("gpt2", [override]), architecture, num_ranks=2)
    assert forecast(architecture, replace(beside, method=method)).peak > 0  # a column beside the run's own
