"""Checks that a run fits into memory, before its weights or data are read."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import torch

from lisa_ds.config import RunConfig
from lisa_ds.config.deepspeed import asked_gradient_bytes, section
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.memory import METHODS, Architecture, RunSettings, forecast, settings
from lisa_ds.memory.advice import usable
from lisa_ds.memory.architectures import Module
from lisa_ds.models import model_config, skeleton
from lisa_ds.report import plan
from lisa_ds.train import fit

_log = logging.getLogger(__name__)


def check_memory(config: RunConfig, *, force: bool = False) -> str | None:
    """Refuse a run that cannot fit into this machine's devices, or whose export cannot fit into the host.

    If the planner does not know the architecture, or ranks share layers, only weights and optimizer state are counted.

    Args:
        config: The run.
        force: Warn instead.

    Returns:
        The plan in a line, where the planner knows the architecture.

    Raises:
        ConfigError: It does not fit; says by how much, and what to change.
    """
    planned, problem = _plan(config)
    if problem is not None:
        if not force:
            raise ConfigError(f"{config.where('model.name_or_path')}: {problem}")
        _log.warning("going on all the same, as --force says: %s", problem)
    return planned


def _plan(config: RunConfig) -> tuple[str | None, str | None]:
    """The plan in a line, and the reason why it does not fit, if so."""
    device, memory = _device()
    if config.tensor_parallel() != 1:  # it knows no gathered parts of layers, nor their activations
        return None, _state_alone(config, memory, device)
    try:
        architecture = _architecture(config)
    except ModelError:
        return None, _state_alone(config, memory, device)
    run = replace(
        settings.from_run(config, architecture, num_ranks=int(os.environ.get("WORLD_SIZE", "1"))),
        on_cpu=not torch.cuda.is_available(),
    )
    own = forecast(architecture, run)
    planned = (
        f"planned: {own.peak / 1e9:.2f} GB on a rank at most, in {own.peak_phase}; {device} has {memory / 1e9:.2f} GB"
    )
    if own.peak > usable(memory):
        report = plan.make(config.model.name_or_path, architecture, run, memory)
        return planned, plan.too_little_memory(report, device)
    exported = own.host["export on rank 0"]
    host = exported + (sum(own.host.values()) - exported) * _local_ranks()
    if torch.cuda.is_available() and host > _host_memory():
        return planned, (
            f"the run needs {host / 1e9:.1f} GB on rank 0's host (offloaded state, and the model that is exported at the end), "
            f"which has {_host_memory() / 1e9:.1f} GB\nTo try it all the same: --force"
        )
    return planned, None


def _architecture(config: RunConfig) -> Architecture:
    architecture = Architecture.from_config(model_config(config.model), config.model.name_or_path)
    if config.model.task == "causal_lm":
        return architecture
    labels, hidden = config.model.num_labels or 2, architecture.sizes.hidden
    sizes = replace(architecture.sizes, vocab=labels)
    return replace(architecture, head=(Module("head", ((labels, hidden),), hidden),), tied=False, sizes=sizes)


def _state_alone(config: RunConfig, memory: int, device: str) -> str | None:
    shape = fit.shape_of(skeleton(config.model), config)
    training = config.training_values()
    run = RunSettings(
        int(os.environ.get("WORLD_SIZE", "1")),
        method=config.method,
        lisa=config.lisa,
        stage=2 if section(config.deepspeed_config(), "zero_optimization").get("stage") == 2 else 3,
        width=2 if training.bf16 or training.fp16 else 4,
        gradient_asked=asked_gradient_bytes(config.deepspeed_config(), config.deepspeed_source()),
        accumulation=training.gradient_accumulation_steps,
    )
    needed = METHODS[run.method].least(shape, run)
    if needed <= usable(memory):
        return None
    return (
        f"weights and optimizer state alone are {needed / 1e9:.2f} GB on a rank, and {device} has {memory / 1e9:.2f} GB; "
        "use more ranks\nTo try it all the same: --force"
    )


def _device() -> tuple[str, int]:
    """The device of a rank, in words, and its memory in bytes."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory
    return f"each of {_local_ranks()} CPU ranks here", _host_memory() // _local_ranks()


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
