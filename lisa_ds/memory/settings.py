"""Reads the settings that decide memory from a run file, as transformers, DeepSpeed and the engine do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lisa_ds.config import ModelConfig, RunConfig
from lisa_ds.config.deepspeed import asked_gradient_bytes, section
from lisa_ds.config.files import read_mapping
from lisa_ds.config.targets import name_nothing
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.memory import catalogue
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.forecast import forecast
from lisa_ds.memory.gather import GatherSettings
from lisa_ds.memory.methods import METHODS
from lisa_ds.memory.run_settings import Forecast, RunSettings

_GATHER_KEYS = ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture that a run's model has: from its directory, the models that are built in here, or the hub.

    Only ``config.json`` is read; a file from the hub that is in the local cache is not downloaded again.

    Raises:
        ModelError: There is no such model, or its architecture is not known to the planner.
    """
    name = model.name_or_path
    where = model.where("name_or_path")
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # unlike pathlib's, it is no error where there can be no such name
        file = os.path.join(path, "config.json")
        if not os.path.isfile(file):
            raise ModelError(f"{where}: {path} holds no config.json, so it is not a Hugging Face model directory")
        return Architecture.from_config(read_mapping(file), file)
    if os.path.isfile(path):
        return Architecture.from_config(read_mapping(path), str(path))
    if (config := catalogue.find(name)) is not None:
        return Architecture.from_config(config, name)
    if name.startswith(("builtin:", "/", ".")) or name.count("/") != 1:
        catalogue.require(name)
    return Architecture.from_config(_from_hub(name, model.revision, where), f"{name}/config.json")


def _from_hub(name: str, revision: str | None, where: str) -> Any:
    from huggingface_hub import hf_hub_download  # a second to import, and rarely needed
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        file = hf_hub_download(name, "config.json", revision=revision)
    except (OSError, HfHubHTTPError, EntryNotFoundError, HFValidationError, ValueError) as error:
        raise ModelError(
            f"{where}: {name} is not one of the models that are built in, no such directory is here, and the hub gave no "
            f"config.json ({type(error).__name__}): check the name, the connection, and for a gated model HF_TOKEN"
        ) from None
    return read_mapping(file)


def from_run(config: RunConfig, architecture: Architecture, *, num_ranks: int) -> RunSettings:
    """The settings of a run that decide its memory.

    Args:
        config: The run.
        architecture: Its model.
        num_ranks: All ranks, those of tensor parallelism included.

    Raises:
        ConfigError: ``tensor_parallel`` does not divide the ranks, or a size is no number.
    """
    _check_targets(config, architecture)
    training, deepspeed = config.training_values(), config.deepspeed_config()
    zero = section(deepspeed, "zero_optimization")
    ways = config.tensor_parallel(num_ranks)
    width = 2 if training.bf16 or training.fp16 else 4
    hidden = architecture.sizes.hidden
    bucket = _number(config, zero, "reduce_bucket_size", hidden**2)
    if bucket is None and config.deepspeed is None and not METHODS[config.method].chooses_bucket:
        bucket = hidden**2  # what transformers makes of the "auto" that launch/train.py writes
    # What transformers makes of "auto": see its integrations/deepspeed.py, trainer_config_finalize.
    automatic = {"prefetch_bucket_size": int(0.9 * hidden**2), "param_persistence_threshold": 10 * hidden}
    given = {key: _number(config, zero, f"stage3_{key}", automatic.get(key)) for key in _GATHER_KEYS}
    return RunSettings(
        world_size=num_ranks // ways,
        micro_batch=training.per_device_train_batch_size,
        sequence=config.data.max_length,
        method=config.method,
        lisa=config.lisa,
        lora=config.lora.effective() if config.method == "lora" else config.lora,
        galore=config.galore,
        stage=2 if zero.get("stage") == 2 else 3,
        width=width,
        bf16=training.bf16,
        gradient_asked=asked_gradient_bytes(deepspeed, config.deepspeed_source()),
        accumulation=training.gradient_accumulation_steps,
        checkpointing=training.checkpointing,
        fused_loss=training.fused_loss
        and architecture.sizes.norm == "rms",  # Liger knows Llama and those built like it
        bucket_size=bucket,
        overlap_comm=zero.get("overlap_comm") is True,
        gather=GatherSettings(**{key: value for key, value in given.items() if value is not None}),
        offload_optimizer=_device(zero, "offload_optimizer") == "cpu",
        offload_param=_device(zero, "offload_param") == "cpu",
        sub_group_size=_number(config, zero, "sub_group_size", None) or 1_000_000_000,
        tensor_parallel=ways,
        second_copies=_number(config, zero, "zero_hpz_partition_size", None) or 1,
    )


def forecast_of(config: RunConfig, *, num_ranks: int, on_cpu: bool) -> Forecast:
    """The plan of a run, from its config alone.

    Args:
        config: The run.
        num_ranks: All ranks.
        on_cpu: Whether ranks are on the CPU.

    Raises:
        LisaError: The planner does not know the model, or the run's settings do not fit it.
    """
    architecture = architecture_of(config.model)
    return forecast(architecture, replace(from_run(config, architecture, num_ranks=num_ranks), on_cpu=on_cpu))


def _check_targets(config: RunConfig, architecture: Architecture) -> None:
    """Refuse a method's ``targets`` that name no linear of the model."""
    if config.method not in ("lora", "galore"):
        return
    lora = config.method == "lora"
    targets = config.lora.effective().targets if lora else config.galore.targets
    if not architecture.linears(targets, inside=not lora, conv1d=lora):
        there = [module.name for module in architecture.block if module.name and (lora or architecture.kind != "gpt2")]
        raise name_nothing(config.where(f"{config.method}.targets"), config.model.name_or_path, targets, there)


def _number(config: RunConfig, zero: Mapping[str, Any], key: str, automatic: int | None) -> int | None:
    value = zero.get(key)
    if value is None or value == "auto":
        return automatic if value else None
    try:
        number = int(float(value))  # a JSON file may say 5e8
    except (TypeError, ValueError, OverflowError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < 2**63:
        raise ConfigError(
            f"{config.deepspeed_source()}: zero_optimization.{key}: should be a number, 0 or more, got {value!r}"
        )
    return number


def _device(zero: Mapping[str, Any], key: str) -> Any:
    return section(zero, key).get("device", "none")
