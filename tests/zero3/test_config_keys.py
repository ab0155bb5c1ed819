"""A DeepSpeed config, held against what DeepSpeed reads of it: a misspelt key trains something else without a word."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig

from lisa_ds.config import RunConfig
from lisa_ds.config import deepspeed as deepspeed_facts
from lisa_ds.engines.zero3 import config_keys, parallel
from lisa_ds.errors import ConfigError
from lisa_ds.memory import Architecture, catalogue, settings
from lisa_ds.train import arguments

ZERO: dict[str, Any] = {"zero_optimization": {"stage": 3}}
UNREAD = f"DeepSpeed {deepspeed.__version__} does not read this key; "

# Ranks that share layers -> a section that says so; a name for one that says no number.
SHARING: dict[Any, dict[str, Any]] = {
    **{1: {}, 2: {"autotp_size": 2}, 4: {"autotp_size": 4, "tp_overlap_comm": False}},
    **{f"no number: {value!r}": {"autotp_size": value} for value in (True, "2", 2.0, -1, None, [2])},
}

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


def test_ranks_that_share_layers_are_read_alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    sharing = {
        name: {"zero_optimization": {"stage": 3}, "tensor_parallel": section} for name, section in SHARING.items()
    }
    for name, fields in sharing.items():
        run = RunConfig(model={"name_or_path": "gpt2"}, data={"path": "rows.jsonl"}, deepspeed=fields)
        readers = [
            lambda fields=fields: deepspeed_facts.autotp_size(fields),
            lambda fields=fields: (parallel.problems(fields), deepspeed_facts.autotp_size(fields))[1],
            lambda run=run: (
                settings.from_run(run, Architecture.from_config(catalogue.require("gpt2")), num_ranks=4).tensor_parallel
            ),
            lambda run=run: (arguments.check(run), run.tensor_parallel())[1],
        ]
        for read in readers:
            if isinstance(name, int):
                assert read() == name
                continue
            with pytest.raises(
                ConfigError, match=r"tensor_parallel.autotp_size: so many.*, got .*; choose a number that"
            ):
                read()


def test_names_of_types_are_deepspeeds_and_so_is_what_they_take() -> None:
    names = {
        str(name): kind.value.itemsize
        for kind in DtypeEnum
        if kind.value != torch.int8
        for name in kind._all_values[1:]
    }
    read = {name: deepspeed_facts.asked_gradient_bytes({"data_types": {"grad_accum_dtype": name}}) for name in names}
    assert read == names
    assert deepspeed_facts.asked_gradient_bytes({"data_types": {}}) is None
    with pytest.raises(
        ConfigError, match=r"^ds.json: data_types.grad_accum_dtype: should be one of fp32, bf16, fp16, got 'int8'; "
    ):
        deepspeed_facts.asked_gradient_bytes({"data_types": {"grad_accum_dtype": "int8"}}, "ds.json")


def test_deepspeeds_zero_means_that_no_ranks_share_layers() -> None:
    assert deepspeed_facts.autotp_size({"tensor_parallel": {"autotp_size": TPTrainingConfig().autotp_size}}) == 1
