"""One training run, from its config to an exported model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from lisa_ds import data, flops, methods
from lisa_ds.checkpoint import names
from lisa_ds.cluster.facts import device_name, devices
from lisa_ds.cluster.preemption import Preemption
from lisa_ds.cluster.watch import Watch
from lisa_ds.cluster.watch import patience as watch_patience
from lisa_ds.config import RunConfig
from lisa_ds.errors import ConfigError
from lisa_ds.integrations import console, hf, sharing
from lisa_ds.integrations.clock import Clock
from lisa_ds.integrations.live_state import LiveState, full_state
from lisa_ds.integrations.log_file import LogFile
from lisa_ds.integrations.order import RowOrder, order_of
from lisa_ds.integrations.phases import Phases
from lisa_ds.integrations.preemption import PreemptionCallback
from lisa_ds.integrations.statistics import LayerStatistics, unreadable
from lisa_ds.integrations.streaming import inputs_of, streamed
from lisa_ds.integrations.tally import keep_tally
from lisa_ds.integrations.throughput import Throughput
from lisa_ds.integrations.trainer import LabelLogitsTrainer
from lisa_ds.memory import ModelShape
from lisa_ds.models import load_model, load_tokenizer
from lisa_ds.run_log import RECORDS
from lisa_ds.train import arguments, checks, fit, stages
from lisa_ds.train.resume import check_order, find_checkpoint, restore_patience, tell
from lisa_ds.train.summary import Summary


def run(
    config: RunConfig, *, resume: str | None = None, force: bool = False, preemption: Preemption | None = None
) -> Summary:
    """Train as ``config`` says, evaluate before and after, and export the model to ``output_dir/model``.

    Every rank calls it; the summary goes to ``output_dir/records.jsonl`` and, by rank 0, to the console.

    Args:
        config: The run.
        resume: ``auto`` for the last complete checkpoint in ``output_dir`` if there is one, or the path of a checkpoint.
        force: Whether to try a run that the planner says cannot fit.
        preemption: Receives the signals after which the run saves and stops.

    Raises:
        Preempted: Some rank has received one. ``--resume auto`` continues the run; nothing has been exported.
        LisaError: Something is wrong with config, data, model or checkpoint. Nothing has been written.
    """
    stages.begin("checking the run and planning its memory")
    method = methods.of(config)
    checked = checks.check(config, force=force)
    given, planned = checked.given, checked.planned
    patience = watch_patience()
    peak = flops.peak_flops(device_name(), os.environ)
    checkpoint = find_checkpoint(config, resume)
    stages.begin(f"reading and tokenising {config.data.path}")
    tokenizer = load_tokenizer(config.model)
    rows = data.load_dataset(config.data, tokenizer, task=config.model.task)
    if config.model.task == "sequence_classification":
        _num_classes(config, *rows)
    fit.check_rows(config, checked.model, tokenizer, *rows)
    stages.begin("joining the process group; DeepSpeed compiles an operator if it is the first time")
    args = arguments.build(config, given, resumed=checkpoint is not None)
    order = order_of(args, data.digest(rows[0]))
    check_order(checkpoint, order, begins_anew=args.ignore_data_skip)
    hf.join_process_group()
    if planned and args.process_index == 0:
        print(planned)
    tell(checkpoint, resume, args)
    place, preemption = Path(args.output_dir), preemption or Preemption()
    with preemption.marked(place), _removed_if_left_empty(place):
        trainer, shape = _build_trainer(config, given, args, tokenizer, *rows)
        live = LiveState(trainer)
        trainer.add_callback(live)
        clock = Clock(trainer)
        trainer.add_callback(clock)
        trainer.add_callback(RowOrder(order))
        console.show_lines(trainer)
        throughput = Throughput(trainer, clock, peak, config.lisa.layers_path)
        trainer.callback_handler.callbacks[:0] = [throughput, Phases(trainer)]
        trainer.add_callback(LogFile(clock, config.written_out(), devices(args.world_size)))
        method.prepare(trainer, config)
        if config.statistics != "off":
            _add_statistics(config, trainer, method.unreadable(config) or unreadable(args))
        restore_patience(trainer, checkpoint)
        trainer.add_callback(PreemptionCallback(preemption, checkpoint))
        stages.begin("building the engine")
        with _watched(trainer, clock, patience):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    with _watched(trainer, clock, patience):
        loss_before, loss_after = _held_out_losses(trainer)
        model = Path(args.output_dir) / "model"
        stages.begin(f"exporting the trained model to {model}")
        _export(trainer, method, model)
        losses = (loss_before, loss_after)
        summary = _summarise(config, trainer, clock, throughput, losses, live.bytes(), shape, model)
        if trainer.is_world_process_zero():
            settings = {"config": config.model_dump(mode="json"), "seed": args.seed, "order": order}
            summary.write(model.parent / RECORDS, settings)
            print(*summary.lines(), sep="\n", flush=True)
    return summary


def _watched(trainer: LabelLogitsTrainer, clock: Clock, patience: float) -> AbstractContextManager[None]:
    """Inside the ``with``, ranks name those that stop, lag or fail."""
    if not patience or trainer.args.world_size == 1:
        return nullcontext()
    watched = Watch(lambda: (f"step {trainer.state.global_step + 1}, {clock.phase}", clock.moves), patience)
    return watched.watching()


def _build_trainer(
    config: RunConfig, given: dict[str, Any], args: TrainingArguments, tokenizer: Any, train_rows: Any, eval_rows: Any
) -> tuple[LabelLogitsTrainer, ModelShape]:
    """The trainer, and the shape of the model that was loaded."""
    task = config.model.task
    if args.process_index == 0:
        print(f"training data: {data.describe(train_rows)}")
        if eval_rows is not None:
            print(f"held-out data: {data.describe(eval_rows)}", flush=True)
    model_config = config.model
    if task == "sequence_classification":
        model_config = model_config.model_copy(update={"num_labels": _num_classes(config, train_rows, eval_rows)})
    set_seed(args.seed)  # a new head is drawn at random
    # `args` keeps transformers' HfDeepSpeedConfig alive, under which a model is built partitioned.
    stages.begin(f"loading the weights of {config.model.name_or_path}")
    method = methods.of(config)
    with sharing.loading(), streamed():
        model = load_model(model_config, method.dtype(config))
    if task == "sequence_classification" and (names := data.label_names(train_rows)):
        names += [f"LABEL_{i}" for i in range(len(names), model.config.num_labels)]  # of a head with room for more
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
    shape = fit.shape_of(model, config)
    model = method.wrap(config, model, args.seed)
    callbacks: list[TrainerCallback] = []
    if "early_stopping_patience" in given:
        threshold = given.get("early_stopping_threshold", 0.0)
        callbacks.append(EarlyStoppingCallback(given["early_stopping_patience"], threshold))
    try:
        trainer = LabelLogitsTrainer(
            model,
            args,
            data_collator=data.collator(tokenizer, pad_to_multiple_of=config.data.pad_to_multiple_of, task=task),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    except ValueError as error:  # arguments that do not go together
        raise ConfigError(f"{config.where('training')}: {' '.join(str(error).split())}") from error
    # What accelerate would do itself at train(), with a warning of a mismatch that is none: the trainer counts micro-batches.
    trainer.accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    return trainer, shape


def _add_statistics(config: RunConfig, trainer: LabelLogitsTrainer, problem: str | None) -> None:
    if problem is not None:
        if trainer.is_world_process_zero():
            print(f"layer statistics are not recorded: {problem}")
        return
    own = getattr(config, config.method, None)  # the method's section
    settings: dict[str, Any] = {} if own is None else {config.method: own.model_dump(mode="json")}
    every: Any = config.statistics
    trainer.add_callback(
        LayerStatistics(
            trainer,
            every=every,
            method=config.method,
            layers_path=config.lisa.layers_path,
            model=config.model.name_or_path,
            settings=settings,
        )
    )


def _num_classes(config: RunConfig, *data_sets: Any) -> int:
    """Number of classes of the head, from the config or else the data.

    Raises:
        ConfigError: The data has more classes, for which the loss would index out of range, or a single one.
    """
    found = max(data.num_labels(rows) or 0 for rows in data_sets if rows is not None)
    if found < 2:
        raise ConfigError(f"{config.where('data.path')}: all rows have the same label; there is nothing to tell apart")
    chosen = config.model.num_labels or found
    if chosen < found:
        raise ConfigError(f"{config.where('model.num_labels')}: the data has {found} classes, got {chosen}")
    return chosen


@contextmanager
def _removed_if_left_empty(directory: Path) -> Iterator[None]:
    """Remove the directory if it is left empty: the trainer makes it before its engine is built, which may fail."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):  # it holds something, or another rank has removed it
                path.rmdir()
        raise


def _held_out_losses(trainer: LabelLogitsTrainer) -> tuple[float | None, float | None]:
    if trainer.eval_dataset is None:
        return None, None
    state = trainer.state
    measured = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    before = next((loss for step, loss in measured if step == 0), None)
    if not trainer.args.load_best_model_at_end and measured and measured[-1][0] == state.global_step:
        return before, measured[-1][1]
    stages.begin("measuring the held-out loss after training")
    return before, trainer.evaluate()["eval_loss"]


def _export(trainer: LabelLogitsTrainer, method: methods.Method, target: Path) -> None:
    """Write weights (or adapters), config and tokenizer; the directory appears whole or not at all."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    if trainer.is_world_process_zero():
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.save_model(str(unfinished))  # every rank takes part, rank 0 writes
    if trainer.is_world_process_zero():
        if not method.exports_adapter:
            names.restore(unfinished, inputs_of(trainer.model), trainer.model)
        (unfinished / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle of the run's arguments, no part of a model
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    if dist.is_initialized():
        dist.barrier()


def _summarise(
    config: RunConfig,
    trainer: LabelLogitsTrainer,
    clock: Clock,
    throughput: Throughput,
    losses: tuple[float | None, float | None],
    live: Mapping[str, int],
    shape: ModelShape,
    model: Path,
) -> Summary:
    world_size = trainer.args.world_size
    tokens = trainer.accelerator.reduce(torch.as_tensor(trainer.tokens, device=trainer.args.device), "sum")
    tokens = int(tokens) // sharing.tensor_parallel_size(trainer.args)  # ranks that share a layer see the same ones
    if config.method == "lisa":
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, hf.LisaCallback))
        live, trained = callback.memory or live, callback.trained
    else:
        trained = [tuple(range(len(shape.layers)))]
    engine = trainer.deepspeed
    return Summary(
        method=config.method,
        steps=trainer.state.global_step,
        skipped_steps=0 if engine is None else engine.skipped_steps,
        loss_before=losses[0],
        loss_after=losses[1],
        live=live,
        full=full_state(trainer, shape, config.lisa.layers_path),
        num_layers=len(shape.layers),
        drawn="layers" if shape.of_blocks is None else "matrices",
        layers_visited=tuple(sorted(set().union(*trained))),
        num_intervals=len(trained),
        tokens=tokens,
        seconds=clock.training,
        world_size=world_size,
        device=devices(world_size),
        throughput=throughput.total(),
        rows_without_labels=keep_tally(trainer).unlabelled(),
        model=model,
    )
