"""Checks the arguments of ``initialize``, and sets the environment variables of ranks where no launcher has."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from lisa_ds.cluster import environment, hosts
from lisa_ds.engines.zero3 import config_keys
from lisa_ds.errors import ConfigError, EngineError

_AS_IN = 'lisa_ds.initialize(model=model, config="ds_zero3.json", lisa_config={"num_sampled_layers": 2})'


def check(args: Any, model: Any, optimizer: Any, model_parameters: Any, lr_scheduler: Any, calibration: Any) -> None:
    """Refuse arguments on which DeepSpeed would fail by an assertion, or much later.

    Raises:
        EngineError: An argument is of a wrong type, or missing.
    """
    if isinstance(args, torch.nn.Module):
        raise EngineError(
            f"initialize: the first argument is args, as in deepspeed.initialize; name the model: {_AS_IN}"
        )
    if model is None:
        raise EngineError(f"initialize: there is no model to train; give it, as in {_AS_IN}")
    if isinstance(model, DeepSpeedEngine):
        raise EngineError(
            f"initialize: model is a {type(model).__name__} already; give the model that it was built from"
        )
    if not isinstance(model, torch.nn.Module):
        remedy = "give a torch.nn.Module"
        if isinstance(model, type):
            remedy = "give an instance of it"
        elif isinstance(model, (str, Path)):
            remedy = "load it first: AutoModelForCausalLM.from_pretrained(...)"
        elif hasattr(model, "train_dataset"):
            remedy = "a trainer goes to lisa_ds.attach(trainer, ...)"
        raise EngineError(f"initialize: model should be a model, got {_shown(model)}; {remedy}")
    if optimizer is not None and not (isinstance(optimizer, torch.optim.Optimizer) or callable(optimizer)):
        raise EngineError(
            f"initialize: optimizer should be a torch optimizer or a function that makes one, got {_shown(optimizer)}; name "
            "one in the config's optimizer section, or build it"
        )
    if isinstance(model_parameters, (str, Mapping)) or not (
        model_parameters is None or hasattr(model_parameters, "__iter__")
    ):
        raise EngineError(
            f"initialize: model_parameters should be parameters or groups of them, got {_shown(model_parameters)}; leave it "
            "out for all of the model's"
        )
    if lr_scheduler is not None and not (callable(lr_scheduler) or hasattr(lr_scheduler, "step")):
        raise EngineError(
            f"initialize: lr_scheduler should be a scheduler or a function that makes one, got {_shown(lr_scheduler)}; name "
            "one in the config's scheduler section, or build it"
        )
    if calibration is not None and not callable(calibration):
        raise EngineError(
            f"initialize: calibration should be a function that is given the model and yields losses, got {_shown(calibration)}"
        )


def deepspeed_config(args: Any, given: Any) -> Any:
    """The keys of the DeepSpeed config to pass on; None if ``args`` names it, where DeepSpeed reads it from.

    Raises:
        EngineError: There is none, or it is given twice.
        ConfigError: It is no config, its file is missing or malformed, or DeepSpeed does not read a key of it.
    """
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if named is not None and given is not None:
        raise EngineError(
            "initialize: a DeepSpeed config is given twice, as config and as args.deepspeed_config; keep one"
        )
    source = given if named is None else named
    if source is None:
        raise EngineError(f"initialize: there is no DeepSpeed config; give its keys or its file, as in {_AS_IN}")
    if not isinstance(source, (dict, str, Path)):
        raise ConfigError(f"config: should be a dict or the path of a JSON file, got {_shown(source)}")
    fields = source if isinstance(source, dict) else _loaded(source)
    config_keys.read(fields, "config" if isinstance(source, dict) else f"config: {source}")
    return fields if named is None else None


def _loaded(source: str | Path) -> dict[str, Any]:
    try:
        fields = load_ds_config(str(source))
    except (OSError, ValueError, RecursionError) as error:
        if not Path(source).exists():  # nor is it base64 of one
            raise ConfigError(f"config: {source}: no such file (looked from {Path.cwd()})") from None
        raise ConfigError(f"config: {source}: cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"config: {source}: should hold keys and values, got {type(fields).__name__}")
    return fields


def find_ranks(*, required: bool | None) -> None:
    """Set torch's ``RANK`` and other variables where no launcher has: for a single process, or a task of a Slurm step.

    DeepSpeed itself would look for MPI, and fail without mpi4py; with mpi4py, or under a cloud's own launcher, it does
    it.

    Args:
        required: ``dist_init_required``, as given to ``deepspeed.initialize``.

    Raises:
        ClusterError: A launcher has set some variables and left out others.
    """
    if dist.is_initialized() or required is False:
        return
    if "RANK" not in os.environ:
        if any(name in os.environ for name in ("AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV")):
            return
        if environment.started_by_mpi(os.environ) and importlib.util.find_spec("mpi4py") is not None:
            return
    environment.fill()
    hosts.place(os.environ)


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__}: {str(value)[:60]}"
