"""Turns the ``training`` and ``deepspeed`` sections into transformers' arguments; reports every mistake beforehand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import multiprocessing
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from lisa_ds import methods
from lisa_ds.config import RunConfig, check_contradictions
from lisa_ds.config.base import Origin, Section, show, validate
from lisa_ds.config.training import ADAMW, EARLY_STOPPING, section
from lisa_ds.errors import ConfigError
from lisa_ds.memory import METHODS

# Whatever these would do, something else here does it.
_ELSEWHERE = {
    "deepspeed": "DeepSpeed's config has a section of its own, deepspeed",
    "resume_from_checkpoint": "resuming is asked for on the command line, --resume auto or --resume PATH",
    "fsdp": "LISA shards its state under DeepSpeed ZeRO-3",
    "fsdp_config": "LISA shards its state under DeepSpeed ZeRO-3",
    "auto_find_batch_size": "it does not go with ZeRO-3",
    "enable_jit_checkpoint": "a run saves itself when it is signalled, see --resume",
    "local_rank": "the launcher sets it",
    "parallelism_config": "ranks that share a layer are deepspeed.tensor_parallel.autotp_size",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "it has no effect: a run evaluates, trains, and evaluates"),
}
# What transformers, accelerate and DeepSpeed raise for values that do not go together.
_REFUSALS = (
    ValueError,
    TypeError,
    NotImplementedError,
    AttributeError,
    LookupError,
    ArithmeticError,
    OSError,
    AssertionError,
)


def check(config: RunConfig) -> dict[str, Any]:
    """The ``training`` section, checked against transformers' own class; nothing has been loaded or written yet.

    Raises:
        ConfigError: Every mistake in ``training``, and every contradiction with ``deepspeed``, one a line.
    """
    where = origin(config)
    given = validate(_section(), config.training, where).model_dump(exclude_unset=True)
    given = _under_present_names(given, where)
    for key, instead in methods.of(config).taken.items():
        if key in given:
            raise ConfigError(f"{where.where(key)}: {instead}, got {show(given[key])}; leave it out")
    asked = given.get("eval_strategy", "no") != "no"
    evaluating = {
        **dict.fromkeys(EARLY_STOPPING, True),
        "eval_on_start": given.get("eval_on_start"),
        "eval_strategy": asked,
    }
    for key in [key for key, needs in evaluating.items() if key in given and needs]:
        if not holds_out(config):
            raise ConfigError(
                f"{where.where(key)}: needs held-out data; set data.eval_fraction, eval_split or eval_path"
            )
        if key in EARLY_STOPPING and given.get("eval_strategy") == "no":
            raise ConfigError(f"{where.where(key)}: needs evaluations on the way, but training.eval_strategy is 'no'")
    if given.get("metric_for_best_model", "loss") not in (None, "loss", "eval_loss"):
        raise ConfigError(
            f"{where.where('metric_for_best_model')}: a run measures eval_loss, got {show(given['metric_for_best_model'])}"
        )
    _check_optimizer(config, given, where)
    _check_combinations(given, where)
    ranks = int(os.environ.get("WORLD_SIZE") or 0)  # if the launcher has told
    shared = config.tensor_parallel(ranks or None)
    # Defaults count, too: a DeepSpeed config that clips at 0.5 contradicts transformers' default of 1.
    check_contradictions(
        {**defaults(), **given},
        config.deepspeed_config(),
        training_source=config.where("training"),
        deepspeed_source=config.deepspeed_source(),
        world_size=ranks // shared if ranks else None,
    )
    return given


def origin(config: RunConfig) -> Origin:
    """Where the ``training`` section was read."""
    return dataclasses.replace(config._origin, prefix="training")


def defaults() -> dict[str, Any]:
    """Transformers' own values of the arguments that have one."""
    return {
        field.name: field.default
        for field in dataclasses.fields(TrainingArguments)
        if field.default is not dataclasses.MISSING
    }


def _check_optimizer(config: RunConfig, given: Mapping[str, Any], origin: Origin) -> None:
    """Refuse optimizers that the engine would refuse once the weights are loaded."""
    if config.method != "lisa" or config.lisa.optimizer.name != "masked_adamw":
        return
    optim = given.get("optim")
    if optim is not None and optim not in ADAMW:
        raise ConfigError(
            f"{origin.where('optim')}: lisa.optimizer 'masked_adamw' computes AdamW, got {show(optim)}; leave it out, or set "
            "lisa.optimizer to 'adamw' to keep the optimizer that is given"
        )
    if config.lisa.optimizer.precision == "stochastic_rounding":
        where = config.where("lisa.optimizer.precision")
        if not given.get("bf16"):
            raise ConfigError(
                f"{where}: 'stochastic_rounding' rounds bf16 weights; set training.bf16 to true, or use 'mixed'"
            )
        zero = config.deepspeed_config().get("zero_optimization")
        for key in ("offload_optimizer", "offload_param"):
            offload = zero.get(key) if isinstance(zero, Mapping) else None
            if isinstance(offload, Mapping) and offload.get("device", "none") != "none":
                raise ConfigError(
                    f"{where}: 'stochastic_rounding' updates the weights on the device that has the gradients; use 'mixed', or "
                    f"remove zero_optimization.{key}"
                )


def _check_combinations(given: Mapping[str, Any], origin: Origin) -> None:
    """Refuse combinations that fail once the weights are loaded, or that have another effect than they say.

    Raises:
        ConfigError: Names key and value, and what to write.
    """
    workers = given.get("dataloader_num_workers", 0)
    strategies, methods = ("random", "sequential", "group_by_length"), multiprocessing.get_all_start_methods()
    accelerator = given.get("accelerator_config") or {}
    nested = accelerator.get("gradient_accumulation_kwargs") if isinstance(accelerator, Mapping) else None
    problems = {
        "dataloader_persistent_workers": (
            given.get("dataloader_persistent_workers") and not workers,
            "takes dataloader_num_workers of 1 or more",
        ),
        "dataloader_multiprocessing_context": (
            given.get("dataloader_multiprocessing_context") not in (None, *methods),
            f"should be one of {', '.join(methods)}",
        ),
        "train_sampling_strategy": (
            given.get("train_sampling_strategy", "random") not in strategies,
            f"should be one of {', '.join(strategies)}",
        ),
        "label_names": (given.get("label_names") not in (None, ["labels"]), "rows have labels under one name: leave it out"),
        "save_only_model": (
            given.get("save_only_model") and given.get("load_best_model_at_end"),
            "does not go with load_best_model_at_end under DeepSpeed",
        ),
        "bf16_full_eval": (given.get("bf16_full_eval") and not given.get("bf16"), "would cast the model that trains; set bf16, or leave it out"),
        "fp16_full_eval": (given.get("fp16_full_eval") and not given.get("fp16"), "would cast the model that trains; set fp16, or leave it out"),
        "accelerator_config": (
            isinstance(accelerator, Mapping) and accelerator.get("split_batches"),
            "split_batches would divide a rank's rows among all; set per_device_train_batch_size instead",
        ),
        " accelerator_config": (
            isinstance(accelerator, Mapping) and accelerator.get("use_seedable_sampler") is False,
            "use_seedable_sampler false would have a resumed run see other rows than those that come next; leave it out",
        ),
        "accelerator_config ": (
            isinstance(nested, Mapping) and "num_steps" in nested,
            "gradient_accumulation_kwargs.num_steps is what gradient_accumulation_steps says; set that",
        ),
    }  # fmt: skip
    for key, (wrong, what) in problems.items():
        if wrong:
            raise ConfigError(f"{origin.where(key.strip())}: {what}, got {show(given[key.strip()])}")


def holds_out(config: RunConfig) -> bool:
    """Whether a run has held-out data."""
    return bool(config.data.eval_fraction or config.data.eval_split or config.data.eval_path)


def build(config: RunConfig, given: Mapping[str, Any], *, resumed: bool) -> TrainingArguments:
    """Transformers' arguments for a run. Building them starts the process group, and makes models load partitioned under ZeRO-3.

    Args:
        config: The run.
        given: Its ``training`` section, from :func:`check`.
        resumed: Whether it resumes from a checkpoint.

    Raises:
        ConfigError: Transformers refuses a combination of values.
    """
    on_cpu = not torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir(config)),
        "report_to": "none",
        "logging_steps": 10,
        "log_level_replica": "error",
        "eval_on_start": holds_out(config),
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        **_early_stopping(given),
        **{key: value for key, value in given.items() if key not in EARLY_STOPPING},
    }
    arguments |= methods.of(config).arguments(config)
    if resumed:
        arguments["eval_on_start"] = False  # the loss before training was measured by the run that began it
    try:
        built = TrainingArguments(**arguments, deepspeed=deepspeed_config(config))
        if (
            built.n_gpu > 1
        ):  # one process that sees several: transformers would split its rows among them by nn.DataParallel
            built._n_gpu = 1
        _try_scheduler(built)
        return built
    except _REFUSALS as error:
        raise ConfigError(f"{config.where('training')}: {' '.join(str(error).split())}") from error


def _try_scheduler(args: TrainingArguments) -> None:
    """Build the learning-rate scheduler once, so that wrong settings are refused before the model is loaded."""
    nothing = torch.optim.SGD([torch.zeros(1, device="cpu")], lr=args.learning_rate)
    get_scheduler(args.lr_scheduler_type, nothing, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)


def output_dir(config: RunConfig) -> Path:
    """Where a run writes: ``training.output_dir``, or ``runs/`` and the name of its config file."""
    return config.output_dir()


def deepspeed_config(config: RunConfig) -> dict[str, Any] | None:
    """The run's DeepSpeed config, or a plain one of the method's stage that takes every value it can from ``training``.

    None for a method that runs without DeepSpeed.

    Raises:
        ConfigError: It asks for something that a run cannot do.
    """
    stages = methods.of(config).stages
    if not stages:
        return None
    auto = "auto"
    from_training: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": auto,
        "gradient_accumulation_steps": auto,
        "gradient_clipping": auto,
        "bf16": {"enabled": auto},
        "fp16": {"enabled": auto},
        "zero_allow_untested_optimizer": True,
    }
    if config.deepspeed is None:
        zero: dict[str, Any] = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
        if not METHODS[config.method].chooses_bucket:
            zero["reduce_bucket_size"] = auto  # DeepSpeed's own default are 5e8 elements
        return {**from_training, "zero_optimization": zero}
    # What the config leaves out DeepSpeed would take from its own defaults: fp32, one micro-batch, no clipping.
    fields = {**from_training, **copy.deepcopy(config.deepspeed_config())}
    source = config.deepspeed_source()
    if config.tensor_parallel() != 1:
        # It would have to count the ranks that share a layer as if they had rows of their own: let DeepSpeed work it out.
        fields.pop("train_batch_size", None)
    zero = fields.setdefault("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if not isinstance(zero, dict) or stage not in stages:
        sharded = f"method {config.method!r} shards its state under ZeRO-{' or ZeRO-'.join(map(str, stages))}"
        raise ConfigError(f"{source}: zero_optimization.stage: {sharded}, got {show(stage)}; set it to {stages[0]}")
    if stage != 3:
        return fields
    if zero.setdefault("stage3_gather_16bit_weights_on_model_save", True) is not True:
        raise ConfigError(
            f"{source}: zero_optimization.stage3_gather_16bit_weights_on_model_save: the trained model is exported at the "
            f"end, got {show(zero['stage3_gather_16bit_weights_on_model_save'])}; set it to true or leave it out"
        )
    return fields


def _early_stopping(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of other arguments that transformers' early stopping requires."""
    if "early_stopping_patience" not in given:
        return {}
    saving = given.get("save_strategy")
    every = given.get("eval_strategy", saving if saving in ("steps", "epoch") else "epoch")
    return {
        "eval_strategy": every,
        "save_strategy": every,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


@functools.cache
def _section() -> type[Section]:
    """Transformers' class as a config section of this package."""
    hints = typing.get_type_hints(TrainingArguments)
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    return section({name: hints[name] for name in names if name not in _ELSEWHERE}, elsewhere=_ELSEWHERE)


def _under_present_names(given: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """Rename two arguments that transformers has renamed; both names are accepted with every release."""
    known = _section().model_fields
    if "activation_checkpointing" not in known:
        return given
    for suffix in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        if old in given and new in given:
            raise ConfigError(f"{origin.where(old)}: is transformers' former name of {new}; keep one of them")
        if old in given:
            given[new] = given.pop(old)
    return given
