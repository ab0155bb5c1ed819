"""LISA inside a Hugging Face ``Trainer``, and so inside TRL's trainers, which are subclasses of it."""

from __future__ import annotations

import difflib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from lisa_ds.config import LisaConfig
from lisa_ds.engines.zero3 import LisaEngine, armed, config_keys, parallel, supported
from lisa_ds.errors import ConfigError, EngineError
from lisa_ds.integrations import console
from lisa_ds.integrations.calibration import CalibrationBatches
from lisa_ds.integrations.order import keep_order
from lisa_ds.integrations.sharing import count_rows_once
from lisa_ds.integrations.tally import keep_tally
from lisa_ds.memory import SAMPLED_KINDS

_FILLED_IN = frozenset(
    (
        *("bf16.enabled", "fp16.enabled", "gradient_accumulation_steps", "gradient_clipping"),
        *("train_batch_size", "train_micro_batch_size_per_gpu"),
        *(f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")),
        *(
            f"scheduler.params.{key}"
            for key in ("total_num_steps", "warmup_max_lr", "warmup_min_lr", "warmup_num_steps")
        ),
        *(f"zero_optimization.{key}" for key in ("reduce_bucket_size", "stage3_param_persistence_threshold")),
        *(f"zero_optimization.stage3_{key}" for key in ("prefetch_bucket_size", "gather_16bit_weights_on_model_save")),
    )
)
"""Keys of a DeepSpeed config whose ``auto`` transformers and accelerate replace; see transformers' integrations/deepspeed.py."""


def attach(trainer: Any, lisa_config: LisaConfig | Mapping[str, Any] | str | Path | None = None) -> None:
    """Make ``trainer.train()`` train by LISA.

    Only the engine of ``trainer.model`` is affected: every other DeepSpeed engine of the process, such as the one of a
    reference model, stays stock. Checkpoints and ``resume_from_checkpoint`` work as without LISA, exactly. Each log
    entry of the trainer carries ``lisa/interval`` and ``lisa/state_mb`` (gradients and optimizer state alive on a rank),
    and rank 0 prints a line for each new draw. Losses are means over the steps that were applied; see
    :mod:`lisa_ds.integrations.tally`.

    Args:
        trainer: A ``transformers.Trainer`` or subclass that runs under DeepSpeed ZeRO-3 and has not trained yet.
        lisa_config: The LISA section: a :class:`~lisa_ds.LisaConfig`, its keys, or a YAML or JSON file.

    Raises:
        ConfigError: The LISA section is wrong, or DeepSpeed cannot read its config, or does not read a key of it.
        EngineError: It is no trainer, does not run under ZeRO-3, or it is attached or trained already. Nothing has changed.

    Example::

        trainer = SFTTrainer(model, args=SFTConfig(..., deepspeed="configs/ds_zero3.json"), train_dataset=rows)
        lisa_ds.attach(trainer, {"num_sampled_layers": 2, "interval_steps": 20})
        trainer.train()
    """
    config = LisaConfig.load(lisa_config)
    _check(trainer)
    steps_per_epoch = _StepsPerEpoch(trainer)
    calibration = CalibrationBatches(trainer, config) if config.sampler.calibrates else None
    train: Callable[..., Any] = trainer.train

    @functools.wraps(train)
    def train_by_lisa(*args: Any, **kwargs: Any) -> Any:
        # Trainer builds its engine inside train(), before it calls on_train_begin: a callback alone would come too late.
        with armed(lambda model: model is trainer.model, config, lambda engine: steps_per_epoch.count(), calibration):
            return train(*args, **kwargs)

    trainer.train = train_by_lisa
    count_rows_once(trainer)
    keep_tally(trainer)
    keep_order(trainer)
    # First of all callbacks, so that the trackers behind it see what it adds to the logs.
    trainer.callback_handler.callbacks.insert(0, LisaCallback(trainer, each_step=config.interval_steps == 1))


def join_process_group() -> None:
    """Tell DeepSpeed of the process group that ``TrainingArguments`` has started.

    On a GPU transformers starts it through DeepSpeed. On a CPU it does not, and a model that is then built partitioned
    would be partitioned over a single rank.
    """
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def check_deepspeed(fields: Mapping[str, Any], source: str, *, lisa: bool) -> None:
    """Check a DeepSpeed config against what DeepSpeed reads and LISA's engine supports, before anything is loaded.

    Args:
        fields: The config; values may still be ``auto``.
        source: What messages call it.
        lisa: Whether LISA's engine is to be built from it.

    Raises:
        ConfigError: Keys that DeepSpeed does not read, values it does not take, or an ``auto`` that is never filled in,
            one a line.
        EngineError: Options that cannot be combined with LISA, one a line.
    """
    if left := sorted(set(_autos(fields)) - _FILLED_IN):
        near = [difflib.get_close_matches(path, _FILLED_IN, n=1, cutoff=0.8) for path in left]
        raise ConfigError(
            "\n".join(
                f"{source}: {path}: 'auto' is filled in for some keys, and this is none of them; write a value"
                + "".join(f", or '{key}'" for key in keys)
                for path, keys in zip(left, near, strict=True)
            )
        )
    zero = config_keys.read(fields, source).zero_config
    if not lisa:
        return
    supported.check_deepspeed()
    problems = supported.zero_problems(zero) + parallel.problems(fields)
    compiling = fields.get("compile")
    if isinstance(compiling, Mapping) and compiling.get("deepcompile"):
        problems.append(supported.DEEPCOMPILE)
    if problems:
        raise EngineError("\n".join(f"{source}: {problem}" for problem in problems))


def _autos(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of what is ``auto``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, str) and value == "auto":
        yield path


def check_fp16(source: str) -> None:
    """Refuse fp16 where DeepSpeed's accelerator cannot compute in it.

    Raises:
        EngineError: It cannot.
    """
    accelerator = get_accelerator()
    if not accelerator.is_fp16_supported():
        raise EngineError(
            f"{source}: {accelerator.device_name()} does not compute in fp16 here; use bf16, or neither for fp32"
        )


class LisaCallback(TrainerCallback):
    """Checks that LISA's engine trains, and reports which layers; :func:`attach` adds it.

    Args:
        trainer: The trainer it reports on.
        each_step: Whether an interval is over after one step.
    """

    def __init__(self, trainer: Any, *, each_step: bool) -> None:
        self._trainer = trainer
        self._each_step = each_step
        self._interval = -1
        self._step_interval = -1  # that of the last step, after which a switch may have come
        self._is_new = False
        self._told = -1
        self.memory: dict[str, int] = {}
        """``engine.memory_report()`` of the interval reported last, once its moments existed."""
        self.trained: list[tuple[int, ...]] = []
        """The sets of layers that have taken a step, in order; also those after the best checkpoint, if that is loaded
        at the end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train if the engine is not LISA's."""
        engine = self._trainer.deepspeed
        if not isinstance(engine, LisaEngine):
            raise EngineError(
                f"attach: the trainer built a {type(engine).__name__} and would train without LISA; attach to the trainer "
                "whose train() is called, and wrap or compile no model beforehand"
            )
        if state.is_world_process_zero:
            for lr in dict.fromkeys(group.get("initial_lr", group["lr"]) for group in engine.optimizer.param_groups):
                tqdm.write(f"learning rates: {engine.rates(float(lr))}")
        engine.draw_first()  # inside the trainer's own forward its losses would get mixed up
        self._interval = engine.interval
        if engine.has_moments:  # resumed amid an interval
            self._tell(engine, state)
        else:
            self.trained = engine.layer_history[:-1]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a new draw."""
        engine = self._trainer.deepspeed
        self._step_interval = self._interval
        self._is_new, self._interval = engine.interval != self._interval, engine.interval
        if self._each_step and self._told >= 0 and state.global_step % max(1, int(state.logging_steps)):
            return  # a line for each entry of the log is enough
        # One step after the switch, when the moments of the new layers are there to be counted.
        if self._told != self._interval and (self._each_step or not self._is_new):
            self._tell(engine, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Add LISA's scalars to the entries of training steps."""
        if "loss" not in logs or not self.memory:
            return
        scalars = {"lisa/interval": self._step_interval, "lisa/state_mb": round(self.state_bytes / 1e6, 3)}
        logs.update(scalars)
        state.log_history[-1].update(scalars)  # Trainer has copied the entry already

    @property
    def state_bytes(self) -> int:
        """Bytes of gradients and optimizer state on this rank in the interval reported last."""
        return sum(self.memory[kind] for kind in SAMPLED_KINDS)

    def _tell(self, engine: LisaEngine, state: Any) -> None:
        self._told = engine.interval
        self.memory = engine.memory_report()
        self.trained = engine.layer_history[:-1] if self._is_new else engine.layer_history
        if state.is_world_process_zero:
            tqdm.write(console.draw(state.global_step, engine.interval, engine.what_trains, self.state_bytes))
            sys.stdout.flush()


class _StepsPerEpoch:
    """Optimizer steps in an epoch, from the data loader that the trainer itself builds just before its engine."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._loader: Any = None
        build: Callable[..., Any] = trainer.get_train_dataloader

        @functools.wraps(build)
        def remembering(*args: Any, **kwargs: Any) -> Any:
            self._loader = build(*args, **kwargs)
            return self._loader

        trainer.get_train_dataloader = remembering

    def count(self) -> int | None:
        try:
            batches = len(self._loader)
        except TypeError:  # a stream
            return None
        return math.ceil(batches / self._trainer.args.gradient_accumulation_steps)


def _check(trainer: Any) -> None:
    if not isinstance(trainer, Trainer):
        if isinstance(trainer, torch.nn.Module):
            remedy = "build one with it, Trainer(model, args=...), or use lisa_ds.initialize(model=model, ...) in a loop of your own"
        elif isinstance(trainer, type):
            remedy = "give an instance of it"
        else:
            remedy = "as in lisa_ds.attach(trainer, {'num_sampled_layers': 2})"
        raise EngineError(
            f"attach: takes a transformers.Trainer, or one of TRL's, got {'the class ' if isinstance(trainer, type) else ''}"
            f"{getattr(trainer, '__name__', type(trainer).__name__)}; {remedy}"
        )
    # Asked of the trainer and its arguments: accelerate's state is shared by every trainer of the process.
    if not trainer.is_deepspeed_enabled:
        raise EngineError(
            "attach: the trainer does not run under DeepSpeed; give its arguments a ZeRO-3 config, as in "
            'TrainingArguments(..., deepspeed="configs/ds_zero3.json")'
        )
    deepspeed_config = trainer.args.deepspeed_plugin.hf_ds_config
    stage = deepspeed_config.get_value("zero_optimization.stage")
    if stage != 3:
        raise EngineError(
            f"attach: LISA shards its state under ZeRO-3, but the trainer's DeepSpeed config has zero_optimization.stage "
            f"{stage}; set it to 3"
        )
    if any(isinstance(callback, LisaCallback) for callback in trainer.callback_handler.callbacks):
        raise EngineError(
            "attach: this trainer is attached already; build a new one to train it by another LISA config"
        )
    if trainer.deepspeed is not None:
        raise EngineError(
            "attach: the trainer has built its engine already; attach before train() and evaluate() "
            "(TrainingArguments(eval_on_start=True) evaluates before the first step)"
        )
    source = trainer.args.deepspeed if isinstance(trainer.args.deepspeed, str) else "deepspeed config"
    check_deepspeed(deepspeed_config.config, source, lisa=True)
