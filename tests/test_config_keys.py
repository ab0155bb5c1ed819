"""A DeepSpeed config, held against what DeepSpeed reads of it: a misspelt key trains something else without a word."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from lisa_ds.engines.zero3 import config_keys
from lisa_ds.errors import ConfigError

ZERO: dict[str, Any] = {"zero_optimization": {"stage": 3}}
UNREAD = f"DeepSpeed {deepspeed.__version__} does not read this key; "

# Sections as DeepSpeed documents them, with each of their keys.
DOCUMENTED: list[dict[str, Any]] = [
    {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 16},
    {"gradient_clipping": 1.0, "prescale_gradients": False, "gradient_predivide_factor": 1.0},
    {"steps_per_print": 10, "wall_clock_breakdown": False, "dump_state": False, "memory_breakdown": False},
    {"communication_data_type": "bf16", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
    {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "dataloader_drop_last": True},
    {"fp16": {"enabled": True, "auto_cast": False, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "consecutive_hysteresis": False, "min_loss_scale": 1}},
    {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-8, "weight_decay": 3e-7, "torch_adam": True}}},
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10}}},
    {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False, "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False}},
    {"flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True, "output_file": None}},
    {"tensorboard": {"enabled": False, "output_path": "logs", "job_name": "train"}, "csv_monitor": {"enabled": False, "job_name": "train"}},
    {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}},
    {"checkpoint": {"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False, "parallel_write": {"pipeline_stage": False}}},
    {"data_efficiency": {"enabled": True, "seed": 1234, "data_sampling": {"enabled": True, "num_epochs": 1000, "num_workers": 0}}},
    {"data_efficiency": {"enabled": False, "what": "is turned off"}},
    {"tensor_parallel": {"autotp_size": 2}},
    {"zero_optimization": {"stage": 3, "overlap_comm": "auto"}},
    {"_comment": "for eight cards", "//": "x", "$schema": "https://json.schemastore.org/any", "comment": 1, "checkpoint": {"_note": 1}},
]  # fmt: skip


@pytest.mark.parametrize("section", DOCUMENTED, ids=lambda section: next(iter(section)))
def test_what_deepspeed_documents_is_read(section: dict[str, Any]) -> None:
    assert config_keys.read({**ZERO, **section}, "ds.json").zero_config.stage == 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gradient_clippping": 1.0}, f"ds.json: gradient_clippping: {UNREAD}did you mean 'gradient_clipping'?"),
        ({"gradient_acumulation_steps": 4}, f"ds.json: gradient_acumulation_steps: {UNREAD}did you mean 'gradient_accumulation_steps'?"),
        ({"train_micro_batch_size": 4}, f"ds.json: train_micro_batch_size: {UNREAD}did you mean 'train_micro_batch_size_per_gpu'?"),
        ({"bf_16": {"enabled": True}}, f"ds.json: bf_16: {UNREAD}did you mean 'bf16'?"),
        ({"offload_optimizer": {"device": "cpu"}}, f"ds.json: offload_optimizer: {UNREAD}it belongs in 'zero_optimization'"),
        ({"stage3_prefetch_bucket_size": 10}, f"ds.json: stage3_prefetch_bucket_size: {UNREAD}it belongs in 'zero_optimization'"),
        ({"seed": 3}, f"ds.json: seed: {UNREAD}remove it"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, f"ds.json: data_types.grad_acum_dtype: {UNREAD}did you mean 'grad_accum_dtype'?"),
        ({"checkpoint": {"tag_valid": "Fail"}}, f"ds.json: checkpoint.tag_valid: {UNREAD}did you mean 'tag_validation'?"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, f"ds.json: activation_checkpointing.cpu_checkpoint: {UNREAD}did you mean 'cpu_checkpointing'?"),
        ({"scheduler": {"type": "WarmupLR", "parms": {}}}, f"ds.json: scheduler.parms: {UNREAD}did you mean 'params'?"),
        ({"zero_optimization": {"stage": 3, "overlap": True}}, "ds.json: zero_optimization.overlap: DeepSpeed says: Extra inputs are not permitted, got True"),
        ({"amp": {"enabled": True}}, "ds.json: DeepSpeed cannot read it: "),
    ],
)  # fmt: skip
def test_a_key_that_nobody_reads_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_keys.read({**ZERO, **section}, "ds.json")
    assert str(refusal.value).startswith(message)


def test_every_unread_key_is_named_at_once_and_the_config_stays_as_it_was() -> None:
    fields = {**ZERO, "gradient_clip": 1, "checkpoint": {"tag": 1}, "train_batch_size": 8}
    before = repr(fields)
    with pytest.raises(ConfigError) as refusal:
        config_keys.read(fields, "ds.json")
    assert [line.split(": ")[1] for line in str(refusal.value).splitlines()] == ["gradient_clip", "checkpoint.tag"]
    assert repr(fields) == before


def test_deepspeed_itself_says_nothing() -> None:
    """Why this room exists; once DeepSpeed refuses such keys, it can go."""
    config = DeepSpeedConfig({**ZERO, "train_micro_batch_size_per_gpu": 1, "gradient_clippping": 0.5})
    assert config.gradient_clipping != 0.5
