"""Every argument of transformers does what it says, is refused, or is told to have no effect."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from lisa_ds.config import load_config
from lisa_ds.errors import LisaError
from lisa_ds.train import arguments, checks, effects
from tests.train.run_to_spoil import folder, made

__all__ = ["folder", "made"]

# What the trainer or the run reads whatever else is set. Every other argument is refused, or told where it does nothing.
USED = set(["output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "weight_decay", "gradient_accumulation_steps", "average_tokens_across_devices", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "activation_checkpointing", "gradient_checkpointing", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "use_cache", "neftune_noise_alpha", "torch_empty_cache_steps", "logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "eval_strategy", "eval_on_start", "save_strategy", "push_to_hub", "load_best_model_at_end", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism", "seed", "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "label_names", "train_sampling_strategy", "group_by_length", "ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics", "warmup_ratio", "logging_dir"])  # fmt: skip
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


def test_every_argument_of_transformers_is_used_refused_or_told() -> None:
    decided = (USED, set(arguments._ELSEWHERE), {*effects._EFFECTIVE, *effects._NEED_HELD_OUT})
    assert FIELDS.keys() <= set().union(*decided)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not decided[one] & decided[other]


def another(name: str) -> Any:
    """A value that is not the argument's default, of its type."""
    special = {
        **{"lr_scheduler_type": "cosine", "optim": "adamw_torch", "eval_strategy": "epoch", "save_strategy": "epoch"},
        **{"logging_strategy": "epoch", "hub_strategy": "end", "log_level": "info", "log_level_replica": "info"},
        **{
            "include_num_input_tokens_seen": "all",
            "train_sampling_strategy": "sequential",
            "debug": "underflow_overflow",
        },
        **{"trackio_static_space_id": "x", "label_names": ["labels"], "dataloader_multiprocessing_context": "fork"},
        **{
            "adam_beta1": 0.5,
            "adam_beta2": 0.5,
            "label_smoothing_factor": 0.1,
            "ddp_backend": "gloo",
            "report_to": "all",
        },
        **{
            "include_for_metrics": ["loss"],
            "max_grad_norm": 0.5,
            "torch_compile_backend": "eager",
            "torch_compile_mode": "default",
        },
    }
    if name in special:
        return special[name]
    default = FIELDS[name].default
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1
    hint = str(FIELDS[name].type)
    return (
        True
        if "bool" in hint and "dict" not in hint
        else {}
        if "dict" in hint
        else 1
        if "int" in hint or "float" in hint
        else "x"
    )


@pytest.mark.parametrize("name", FIELDS)
def test_no_argument_ends_in_a_traceback_or_is_ignored(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    refused = ""
    with caplog.at_level(logging.WARNING, "lisa_ds"):
        try:
            given = checks.check(load_config("run.yaml", [f"training.{name}={json.dumps(another(name))}"])).given
        except LisaError as error:
            refused = str(error)
    told = "\n".join(record.getMessage() for record in caplog.records)
    if refused:
        assert f"training.{name}: " in refused
    elif name not in USED:  # one that does something by itself is not told
        alone, _ = effects._EFFECTIVE.get(name, (lambda given: True, ""))
        assert (f"training.{name}: " in told) != alone(given), (name, told)


@pytest.mark.parametrize(
    ("overrides", "key", "why"),
    [
        (["training.max_steps=5", "training.num_train_epochs=2"], "num_train_epochs", "max_steps says how long the run is"),
        (["training.lr_scheduler_type=constant", "training.warmup_steps=5"], "warmup_steps", "this lr_scheduler_type has no warm-up; constant_with_warmup has"),
        (["training.run_name=mine"], "run_name", "it takes a tracker, report_to"),
        (["training.eval_steps=5"], "eval_steps", "it takes eval_strategy: steps"),
        (["training.save_strategy=epoch", "training.save_steps=5"], "save_steps", "it takes save_strategy: steps"),
        (["training.gradient_checkpointing_kwargs={use_reentrant: false}"], "gradient_checkpointing_kwargs", "it takes gradient_checkpointing: true"),
        (["training.liger_kernel_config={rope: false}"], "liger_kernel_config", "it takes use_liger_kernel: true"),
        (["training.ddp_bucket_cap_mb=5"], "ddp_bucket_cap_mb", "it is an option of DDP, and ZeRO-3 is at work instead"),
        (["training.early_stopping_threshold=0.1"], "early_stopping_threshold", "it takes early_stopping_patience"),
        (["data.eval_fraction=0.0", "training.per_device_eval_batch_size=3"], "per_device_eval_batch_size", "there is no held-out data"),
        (["training.hub_model_id=a/b"], "hub_model_id", "it takes push_to_hub: true"),
        (["training.optim_args=a=1"], "optim_args", "torch's AdamW takes its settings from adam_beta1 and the like"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture, overrides: list[str], key: str, why: str
) -> None:
    with caplog.at_level(logging.WARNING, "lisa_ds"):
        checks.check(load_config("run.yaml", overrides))
    assert [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()] == [
        f"command line: training.{key}: has no effect in this run: {why}"
    ]


def test_keys_that_do_what_they_say_are_not_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = [
        "eval_strategy=steps",
        "eval_steps=2",
        "save_steps=4",
        "load_best_model_at_end=true",
        "greater_is_better=false",
        "warmup_steps=3",
    ]
    more += [
        "num_train_epochs=2",
        "gradient_checkpointing=true",
        "gradient_checkpointing_kwargs={use_reentrant: false}",
    ]
    more += ["dataloader_num_workers=1", "dataloader_persistent_workers=true", "adam_beta1=0.8", "save_total_limit=2"]
    with caplog.at_level(logging.WARNING, "lisa_ds"):
        checks.check(load_config("run.yaml", [f"training.{each}" for each in more]))
    assert "has no effect" not in caplog.text


def test_one_process_trains_on_one_gpu_however_many_it_sees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("run.yaml", ["method=galore", "deepspeed=null"])
    given = arguments.check(config)

    def sees_four(self: TrainingArguments) -> Any:
        self._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(sees_four))
    built = arguments.build(config, given, resumed=False)
    assert (built.n_gpu, built.train_batch_size) == (1, built.per_device_train_batch_size)
