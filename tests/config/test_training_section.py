"""The training section without transformers: its names are transformers' own, and what it has given up is told by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest
from transformers import TrainingArguments

from lisa_ds.config import load_config, training
from lisa_ds.errors import ConfigError
from lisa_ds.train import arguments

RUN = "model: {name_or_path: gpt2}\ndata: {path: rows.jsonl}\n"
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


def test_the_names_that_are_read_from_the_source_are_those_of_the_class() -> None:
    kind = training.known()
    assert kind is not None
    names = {name for name, field in kind.model_fields.items() if not field.exclude}
    assert names == {*FIELDS, *training.EARLY_STOPPING}


def test_what_is_read_without_transformers_has_its_type_and_default() -> None:
    hints, ours = get_type_hints(TrainingArguments), get_type_hints(training.TrainingValues)
    for field in dataclasses.fields(training.TrainingValues):
        if field.name in FIELDS:
            assert ours[field.name] == hints[field.name], field.name
            assert field.default == FIELDS[field.name].default, field.name


def test_limits_are_of_keys_that_there_are_and_the_default_is_within() -> None:
    for name, (least, most) in training._LIMITS.items():
        assert name in {*FIELDS, *training.EARLY_STOPPING}, name
        default = FIELDS[name].default if name in FIELDS else None
        assert default is None or least <= default <= most, name


# Fields of TrainingArguments in transformers 4.57.6 that 5.23 has no more, by its source.
REMOVED = [
    "adafactor",
    "fp16_backend",
    "fp16_opt_level",
    "fsdp_min_num_params",
    "fsdp_transformer_layer_cls_to_wrap",
    "group_by_length",
    "half_precision_backend",
    "include_inputs_for_metrics",
    "include_tokens_per_second",
    "jit_mode_eval",
    "logging_dir",
    "mp_parameters",
    "no_cuda",
    "overwrite_output_dir",
    "past_index",
    "per_gpu_eval_batch_size",
    "per_gpu_train_batch_size",
    "push_to_hub_model_id",
    "push_to_hub_organization",
    "push_to_hub_token",
    "ray_scope",
    "save_safetensors",
    "torchdynamo",
    "tpu_metrics_debug",
    "tpu_num_cores",
    "use_legacy_prediction_loop",
    "use_mps_device",
    "warmup_ratio",
    "evaluation_strategy",
]


@pytest.mark.parametrize("name", REMOVED)
def test_a_name_that_transformers_has_given_up_is_told_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    config = load_config("run.yaml", [f"training.{name}=1"])
    for check in (config.training_values, lambda: arguments.check(config)):
        if name in FIELDS:  # an older transformers
            continue
        with pytest.raises(ConfigError) as caught:
            check()
        assert str(caught.value) == (
            f"command line: training.{name}: the installed transformers has no such argument; {training.FORMER[name]}, got 1"
        )


def test_what_is_written_instead_is_there() -> None:
    for former, write in training.FORMER.items():
        if former not in FIELDS and (write.startswith("set ") or write.startswith("its name is ")):
            new = write.removeprefix("set ").removeprefix("its name is ").split(":")[0].split()[0]
            assert new in FIELDS or new in ("the", "fp16"), (former, write)


def test_a_misspelt_name_is_not_taken_for_a_former_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(ConfigError, match=r"unknown key, got 0.1; did you mean 'warmup_steps'\?"):
        load_config(tmp_path / "run.yaml", ["training.warmup_step=0.1"]).training_values()


def test_without_transformers_a_run_is_planned_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lisa_ds.config.run.known", lambda: None)
    (tmp_path / "run.yaml").write_text(RUN)
    config = load_config(tmp_path / "run.yaml", ["training.bf16=true", "training.seed=3"])
    assert config.training_values().bf16
    with pytest.raises(ConfigError, match=r"training\.bf16: should be true or false, got 3"):
        load_config(tmp_path / "run.yaml", ["training.bf16=3"]).training_values()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "4294967296", "should be 4294967295 or less, got 4294967296"),
        ("seed", "-1", "should be 0 or more, got -1"),
        ("adam_beta2", "1.0", "should be less than 1, got 1.0"),
        ("adam_beta1", "-0.1", "should be 0 or more, got -0.1"),
        ("num_train_epochs", "1e300", "should be 1000000 or less, got 1e+300"),
        ("ddp_timeout", "100000000000000", "should be 1000000000 or less, got 100000000000000"),
        ("dataloader_num_workers", "1000000", "should be 1024 or less, got 1000000"),
        ("label_smoothing_factor", "2", "should be 1 or less, got 2"),
        ("logging_steps", "-1", "should be 0 or more, got -1"),
        ("label_names", "[1]", "should be a list of text or nothing, got [1]"),
        ("liger_kernel_config", "{rope: 3}", "should be keys and values or nothing, got {'rope': 3}"),
        ("trackio_static_space_id", "true", "should be text or nothing or false, got True"),
        ("output_dir", "x" * 256, "should be a path, whose parts have at most 255 bytes, got 'xxx"),
        ("parallelism_config", "{tp_size: 2}", "does not belong here: ranks that share a layer are deepspeed.tensor_parallel"),
    ],
)  # fmt: skip
def test_types_and_limits(tmp_path: Path, key: str, value: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(ConfigError) as caught:
        arguments.check(load_config(tmp_path / "run.yaml", [f"training.{key}={value}"]))
    assert f"training.{key}: {message}" in str(caught.value)
