"""``lisa_ds.initialize``; and ``armed``, by which a trainer's own ``deepspeed.initialize`` builds the LISA engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine

from lisa_ds.config import LisaConfig
from lisa_ds.engines.zero3 import arguments, supported
from lisa_ds.engines.zero3.engine import LisaEngine
from lisa_ds.engines.zero3.scoring.measure import Calibration
from lisa_ds.errors import EngineError


@contextmanager
def armed(
    is_armed: Callable[[Any], bool],
    config: LisaConfig,
    steps_per_epoch: Callable[[Any], int | None] = lambda engine: None,
    calibration: Calibration | None = None,
) -> Iterator[None]:
    """Inside the ``with``, ``deepspeed.initialize`` builds a :class:`LisaEngine` for the first model that is armed.

    Every other model of the process (a reference or a reward model) gets the stock engine. ``deepspeed.initialize`` names
    its engine class itself, so the name is rebound here and restored on the way out, also after an exception.

    Args:
        is_armed: Returns whether the model given to ``deepspeed.initialize`` is the one to train.
        config: Its LISA section.
        steps_per_epoch: Returns the optimizer steps in one pass over the data, from the partly built engine (whose
            batch size is known); None where unknown. For intervals counted in epochs.
        calibration: As for :func:`initialize`.
    """
    supported.check_deepspeed()
    stock = deepspeed.DeepSpeedEngine
    built = False

    class _Select(type):
        # A class and not a function: accelerate asks isinstance(engine, deepspeed.DeepSpeedEngine).
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            nonlocal built
            if built or not is_armed(kwargs.get("model")):
                return stock(*args, **kwargs)
            engine = LisaEngine(*args, lisa=config, steps_per_epoch=steps_per_epoch, calibration=calibration, **kwargs)
            built = True
            return engine

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, stock)

    deepspeed.DeepSpeedEngine = _Select("DeepSpeedEngine", (DeepSpeedEngine,), {})
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine = stock


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    *,
    lisa_config: LisaConfig | dict[str, Any] | str | Path | None = None,
    calibration: Calibration | None = None,
    **kwargs: Any,
) -> tuple[LisaEngine, Any, Any, Any]:
    """``deepspeed.initialize`` with LISA: the same arguments and the same 4-tuple, plus ``lisa_config`` and ``calibration``.

    Args:
        args: As for ``deepspeed.initialize``; so are all others but ``lisa_config``.
        model: The model to train.
        optimizer: A torch optimizer or a callable; None to take the DeepSpeed config's.
        model_parameters: What the config's optimizer trains; None for every parameter of ``model``.
        training_data: A dataset; needed for an ``interval_steps`` counted in epochs.
        lr_scheduler: A scheduler or a callable.
        lisa_config: The LISA section: a :class:`~lisa_ds.LisaConfig`, a dict of its keys, or a YAML or JSON file.
        calibration: For samplers that measure scores on data (``grad_norm``, ``fisher``): given the model, runs this rank's share
            of the calibration batches through it and yields one loss for each. It is called once for each pass over them;
            every rank must yield as many losses.
        **kwargs: ``config`` (a dict or a path), ``mpu``, ``dist_init_required``, ``collate_fn``, ….

    A plain ``python script.py``, without a launcher, is a run on one rank.

    Returns:
        ``engine, optimizer, training_dataloader, lr_scheduler``; the engine is a :class:`LisaEngine`.

    Raises:
        ConfigError: The LISA section is wrong, or does not fit the model; or the DeepSpeed config cannot be read.
        ClusterError: A launcher has set some of torch's variables and left out others.
        EngineError: An argument is missing or of a wrong type; DeepSpeed, or an option of its config, cannot be combined with LISA.

    Example::

        engine, *_ = lisa_ds.initialize(model=model, config="ds_zero3.json", lisa_config={"num_sampled_layers": 2})
    """
    config = LisaConfig.load(lisa_config)
    arguments.check(args, model, optimizer, model_parameters, lr_scheduler, calibration)
    if isinstance(model, PipelineModule):
        raise EngineError(
            "model: a PipelineModule does not go with ZeRO-3; use the Megatron engine for pipeline stages"
        )
    first_name = kwargs.pop("config_params", None)  # DeepSpeed's former name of it
    chosen = kwargs.pop("config", None)
    kwargs["config"] = arguments.deepspeed_config(args, first_name if chosen is None else chosen)
    arguments.find_ranks(required=kwargs.get("dist_init_required"))
    if optimizer is None and model_parameters is None:
        model_parameters = list(model.parameters())

    def steps_per_epoch(engine: Any) -> int | None:
        # Under AutoTP the engine's batch size counts the ranks that share a layer, and so their rows, twice.
        rows = engine.train_batch_size() // max(1, engine.autotp_size())
        return None if training_data is None else math.ceil(len(training_data) / rows)

    with armed(lambda candidate: candidate is model, config, steps_per_epoch, calibration):
        result = deepspeed.initialize(
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            **kwargs,
        )
    if not isinstance(result[0], LisaEngine):
        raise EngineError(
            f"deepspeed.initialize built a {type(result[0]).__name__}; LISA works with the plain ZeRO-3 engine: turn off "
            "hybrid_engine, and use the Megatron engine for pipeline parallelism"
        )
    return result
