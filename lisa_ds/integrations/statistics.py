"""Records norms by layer during any trainer's run: under LISA, full fine-tuning or LoRA.

Under ZeRO-3 they are read from partitions by :mod:`lisa_ds.engines.zero3.watch.statistics`; without DeepSpeed, from the model and the
optimizer as they are, on rank 0 alone. Under LoRA the norm of a weight is that of the effective weight, adapters
included.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from lisa_ds import records
from lisa_ds.engines.zero3 import LisaEngine
from lisa_ds.engines.zero3.optimizer.unit_norms import Part, UnitSquares, adam_step, update_square
from lisa_ds.engines.zero3.watch.statistics import Norms, UnitStatistics, units_of, watch
from lisa_ds.errors import EngineError
from lisa_ds.integrations.adapters import Adapters
from lisa_ds.layers import LayerStack, Unit
from lisa_ds.ops.reference import dequantise_signed, dequantise_unsigned
from lisa_ds.sampling import statistics

STEPS_WITHOUT_INTERVALS = 20
"""Steps between two recordings of a method that has no intervals: LISA's default interval."""

_log = logging.getLogger(__name__)


class LayerStatistics(TrainerCallback):
    """Records the norms of weights, gradients and updates of each layer in ``layers.jsonl``; see docs/layers.md.

    Add it before ``trainer.train()``; with :func:`lisa_ds.attach` before or after that.

    Args:
        trainer: A ``transformers.Trainer``: under LISA, ZeRO-3 or no DeepSpeed at all, with or without PEFT adapters.
        path: The file; None for ``layers.jsonl`` in the trainer's ``output_dir``.
        every: ``interval``: at the end of each of LISA's intervals; every 20 steps without LISA, and with intervals of one step.
            Or a number of steps.
        method: The run's method in reports; None to detect ``lisa``, ``lora`` or ``full``.
        layers_path: As in the LISA section.
        model: What the file calls the model; by default, what it was loaded from.
        settings: Further facts about the run, written to the file as they are.

    Example::

        trainer = Trainer(get_peft_model(model, LoraConfig(r=8)), args, train_dataset=rows)
        trainer.add_callback(LayerStatistics(trainer))
        trainer.train()
    """

    def __init__(
        self,
        trainer: Any,
        path: str | Path | None = None,
        *,
        every: Literal["interval"] | int = "interval",
        method: str | None = None,
        layers_path: str = "auto",
        model: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if every != "interval" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every: should be 'interval' or a number of steps, 1 or more, got {every!r}")
        self._trainer = trainer
        self._path = Path(path if path is not None else Path(trainer.args.output_dir) / statistics.FILE_NAME)
        self._every, self._method, self._layers_path = every, method, layers_path
        self._model, self._settings = model, dict(settings or {})
        self._reader: _Reader | None = None
        self._writer: statistics.Writer | None = None
        self._last = 0  # step of the last recording

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the model's units, now that the engine exists, and write to the file what runs.

        Raises:
            EngineError: The trainer shards the model by something else than ZeRO-3.
        """
        trainer = self._trainer
        self.close()
        engine = trainer.deepspeed
        by_lisa = isinstance(engine, LisaEngine)
        stack = engine.stack if by_lisa else LayerStack.from_model(trainer.model, self._layers_path)
        adapters = Adapters(trainer.model)
        self._reader = _reader(trainer, stack, adapters, self._take)
        self._last = state.global_step
        if state.is_world_process_zero:
            self._begin(stack, adapters, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read gradients, without DeepSpeed: under ZeRO-3 they are read inside the step."""
        if isinstance(self._reader, _Whole):
            self._reader.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record, without DeepSpeed: under ZeRO-3 that is done inside the step."""
        if isinstance(self._reader, _Whole):
            self._reader.stepped()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Release the trainer's optimizer."""
        self.close()

    def close(self) -> None:
        """Stop recording."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._writer = None

    def _begin(self, stack: LayerStack, adapters: Adapters, step: int) -> None:
        trainer, model = self._trainer, self._trainer.model
        args = trainer.args
        found = "lisa" if isinstance(trainer.deepspeed, LisaEngine) else "lora" if adapters.any else "full"
        kept = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed")
        start = statistics.Start(
            step=step,
            method=self._method or found,
            model=self._model or str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
            units=tuple(str(unit) for unit in units_of(stack)),
            tied=stack.tied,
            matrices=tuple(unit.name for unit in stack.units) if stack.by_matrices else (),
            settings={**{key: getattr(args, key) for key in kept}, "world_size": args.world_size, **self._settings},
            commit=records.commit(),
            versions=records.versions((*records.PACKAGES, "peft") if adapters.any else records.PACKAGES),
        )
        try:
            self._writer = statistics.Writer(self._path, start)
        except OSError as error:
            self._give_up(error)

    @property
    def _steps(self) -> int:
        return STEPS_WITHOUT_INTERVALS if self._every == "interval" else int(self._every)

    def _take(self) -> None:
        """After each applied step, on every rank: record if it is time to."""
        engine, state = self._trainer.deepspeed, self._trainer.state
        step = state.global_step + 1  # the trainer counts it a moment later
        has_intervals = isinstance(engine, LisaEngine)
        by_interval = has_intervals and self._every == "interval" and engine.interval_steps > 1
        due = engine.ends_interval if by_interval else step // self._steps > self._last // self._steps
        if self._reader is None or not (due or step == state.max_steps):
            return
        reading = self._reader.read()
        self._last = step
        if self._writer is None:
            return
        history = engine.layer_history if has_intervals else None
        try:
            self._writer.append(
                statistics.Recording(
                    step=step,
                    interval=engine.interval if has_intervals else (step - 1) // self._steps,
                    weight_norm=_named(reading.norms.weight),
                    gradient_norm=_named(reading.norms.gradient),
                    update_norm=_named(reading.norms.update),
                    sampled=tuple(str(unit) for unit in reading.trained),
                    gradient_steps=reading.steps,
                    visits=None if history is None else statistics.count_visits(self._reader.num_layers, history),
                    probabilities=engine.probabilities if has_intervals else None,
                )
            )
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # The run is worth more than its statistics, and other ranks would wait for this one.
        _log.warning(
            "%s: cannot be written, so layer statistics are no longer recorded: %s", self._path, error.strerror
        )
        self._writer = None


@dataclass(frozen=True)
class _Reading:
    norms: Norms
    trained: Sequence[Unit]
    steps: int


class _Reader(Protocol):
    num_layers: int

    def read(self) -> _Reading:
        """Norms now, those of gradients since the last reading."""

    def close(self) -> None:
        """Stop watching."""


class _Partitioned:
    """Under ZeRO-3; every rank takes part in a reading."""

    def __init__(self, optimizer: Any, stack: LayerStack, adapters: Adapters, take: Any) -> None:
        self.num_layers = len(stack.units)
        self._stack, self._adapters, self._take = stack, adapters, take
        self._watch: UnitStatistics = watch(optimizer, stack)
        self._watch.after_step.append(take)
        self._mark = self._watch.mark()

    def read(self) -> _Reading:
        weights = self._adapters.plain_weights() if self._adapters.any else None
        norms = self._watch.read(self._mark, weights)
        if self._adapters.any:
            norms = _with_adapters(norms, self._adapters, self._stack)
        reading = _Reading(norms, self._watch.trained(self._mark), self._watch.applied - self._mark.applied)
        self._mark = self._watch.mark()
        return reading

    def close(self) -> None:
        self._watch.after_step.remove(self._take)


class _Whole:
    """Without DeepSpeed: every rank has whole weights and, when the optimizer steps, the same gradients; rank 0 reads them."""

    def __init__(self, trainer: Any, stack: LayerStack, adapters: Adapters, take: Any) -> None:
        self.num_layers = len(stack.units)
        self._trainer, self._stack, self._adapters, self._take = trainer, stack, adapters, take
        self._units = units_of(stack)
        self._index = {unit: i for i, unit in enumerate(self._units)}
        self._squares_of = UnitSquares(len(self._units), trainer.args.device)
        self._is_first = trainer.is_world_process_zero()
        self._clip = trainer.accelerator.clip_grad_norm_
        trainer.accelerator.clip_grad_norm_ = self._clip_and_remember
        self._coefficient: Any = None  # what clipping has multiplied this step's gradients by
        self._restart()

    def _restart(self) -> None:
        self._sum = self._squares_of.zeros()
        self._steps = [0] * len(self._units)
        self._applied = 0
        self._pending: tuple[Any, set[int]] | None = None

    def _clip_and_remember(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = self._clip(parameters, max_norm, norm_type)
        self._coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def before_step(self) -> None:
        if not self._is_first:
            return
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        factor = self._coefficient
        if factor is None and scaler is not None:  # clipping would have undone the loss scale
            factor = scaler.get_scale()
        parts = [
            Part(parameter.grad, self._index[self._stack.unit_of[id(parameter)]])
            for parameter in self._trainer.model.parameters()
            if parameter.grad is not None
        ]
        squares = self._squares_of.of(parts)
        self._pending = (squares if factor is None else squares / factor**2, {part.unit for part in parts})
        self._coefficient = None

    def stepped(self) -> None:
        if self._trainer.accelerator.optimizer_step_was_skipped:
            return
        if self._pending is not None:
            squares, trained = self._pending
            self._sum += squares
            for unit in trained:
                self._steps[unit] += 1
            self._pending = None
        self._applied += 1
        self._take()

    @torch.no_grad()
    def read(self) -> _Reading:
        trained = tuple(unit for unit, steps in zip(self._units, self._steps, strict=True) if steps)
        if self._is_first:
            norms = self._norms()
        else:
            nothing: dict[Unit, float | None] = dict.fromkeys(self._units)
            norms = Norms(nothing, nothing, nothing)
        reading = _Reading(norms, trained, self._applied)
        self._restart()
        return reading

    def _norms(self) -> Norms:
        weights = self._adapters.plain_weights()
        squares = self._squares_of.of([Part(p, self._index[self._stack.unit_of[id(p)]]) for p in weights])
        weight: list[float] = squares.tolist()
        gradient: list[float] = self._sum.tolist()
        norms = Norms(
            weight={unit: weight[i] ** 0.5 for unit, i in self._index.items()},
            gradient={
                unit: (gradient[i] / self._steps[i]) ** 0.5 if self._steps[i] else None
                for unit, i in self._index.items()
            },
            update=self._updates(),
        )
        return _with_adapters(norms, self._adapters, self._stack) if self._adapters.any else norms

    def _updates(self) -> dict[Unit, float | None]:
        squares: dict[Unit, float | None] = dict.fromkeys(self._units)
        unread: set[Unit] = set()
        optimizer = self._trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter) or {}
                step = adam_step(optimizer, group, state)
                unit = self._stack.unit_of.get(id(parameter))
                if step is None or unit is None or self._steps[self._index[unit]] == 0:
                    continue
                if "projector" in state:  # GaLore: the moments are of projected gradients, the update is not
                    unread.add(unit)
                    continue
                first, second = state["exp_avg"], state["exp_avg_sq"]
                if "exp_avg_scale" in state:
                    first = dequantise_signed(first.reshape(-1), state["exp_avg_scale"])
                    second = dequantise_unsigned(second.reshape(-1), state["exp_avg_sq_scale"])
                square = update_square(state.get("master", parameter), first, second, step).item()
                squares[unit] = (squares[unit] or 0.0) + square
        squares.update(dict.fromkeys(unread))
        return {unit: None if square is None else square**0.5 for unit, square in squares.items()}

    def close(self) -> None:
        self._trainer.accelerator.clip_grad_norm_ = self._clip


def unreadable(args: Any) -> str | None:
    """Why the layers of a trainer with these ``TrainingArguments`` cannot be read; None if they can."""
    plugin = args.deepspeed_plugin
    stage = 3 if plugin is None else plugin.hf_ds_config.get_value("zero_optimization.stage")
    return None if stage == 3 else f"they are read from ZeRO-3's partitions, and this run is under ZeRO-{stage}"


def _reader(trainer: Any, stack: LayerStack, adapters: Adapters, take: Any) -> _Partitioned | _Whole:
    engine = trainer.deepspeed
    if engine is not None:
        if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            raise EngineError(
                f"LayerStatistics: reads ZeRO-3's partitions, but the trainer's DeepSpeed config has zero_optimization.stage "
                f"{engine.zero_optimization_stage()}; set it to 3, or train without DeepSpeed"
            )
        return _Partitioned(engine.optimizer, stack, adapters, take)
    if trainer.is_fsdp_enabled or any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        raise EngineError(
            "LayerStatistics: the trainer's model is sharded by FSDP or tensor parallelism, whose shards it does not read; "
            "use DeepSpeed ZeRO-3"
        )
    return _Whole(trainer, stack, adapters, take)


def _with_adapters(norms: Norms, adapters: Adapters, stack: LayerStack) -> Norms:
    """``norms`` with those of effective weights where there are adapters, computed one module at a time."""
    weight = dict(norms.weight)
    for parameter, square in adapters.effective_squares():
        unit = stack.unit_of[id(parameter)]
        before = weight[unit]
        weight[unit] = None if before is None or square is None else (before**2 + square) ** 0.5
    return Norms(weight, norms.gradient, norms.update)


def _named(norms: Mapping[Unit, float | None]) -> dict[str, float | None]:
    return statistics.finite({str(unit): norm for unit, norm in norms.items()})
