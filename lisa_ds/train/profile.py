"""``lisa-ds profile``: scores every layer of a run's model on its training data, without training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lisa_ds
from lisa_ds import data, records
from lisa_ds.config import LisaConfig, RunConfig
from lisa_ds.engines.zero3.scoring.measure import measure
from lisa_ds.errors import ConfigError
from lisa_ds.integrations import hf, sharing
from lisa_ds.integrations.calibration import choose_rows, rows_in_batch
from lisa_ds.integrations.streaming import streamed
from lisa_ds.models import load_model, load_tokenizer
from lisa_ds.sampling.scores import LayerScores
from lisa_ds.train import arguments, checks, fit


def profile(config: RunConfig, *, out: Path, score: str | None = None) -> LayerScores:
    """Score the layers of ``config``'s model, and write the file that ``sampler: {name: fixed_scores}`` reads.

    Every rank calls it.

    Args:
        config: A run; its sampler says what is measured, and on how many batches.
        out: The file, written by rank 0.
        score: ``accumulated``, ``mean`` (of gradients), ``empirical``, ``hutchinson`` (of the curvature) or ``weight_norm``; None
            for what the run's sampler measures.

    Raises:
        LisaError: Something is wrong with config, data or model, or the file exists. Nothing has been written.
    """
    config = config.model_copy(update={"method": "lisa", "lisa": _measuring(config.lisa, score)})
    checked = checks.check(config)
    if os.environ.get("RANK", "0") == "0":
        _check_target(out)
    tokenizer = load_tokenizer(config.model)
    rows, _ = data.load_dataset(config.data, tokenizer, task=config.model.task)
    fit.check_rows(config, checked.model, tokenizer, rows)
    args = arguments.build(config, checked.given, resumed=False)
    hf.join_process_group()
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model_config = config.model
    if config.model.task == "sequence_classification" and config.model.num_labels is None:
        model_config = config.model.model_copy(update={"num_labels": data.num_labels(rows)})
    torch.manual_seed(args.seed)  # a new head is drawn at random
    with sharing.loading(), streamed():
        model = load_model(model_config, dtype)
    batches = _batches(
        config,
        args,
        rows,
        data.collator(tokenizer, pad_to_multiple_of=config.data.pad_to_multiple_of, task=config.model.task),
    )
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.learning_rate),
        config=_finished(args, model),
        lisa_config=config.lisa,
        calibration=batches,
    )
    found = LayerScores(
        score=str(config.lisa.sampler.kind.measure),
        scores=tuple(measure(engine, config.lisa, batches)),
        model=config.model.name_or_path,
        settings={
            "data": config.data.model_dump(mode="json"),
            "sampler": config.lisa.sampler.model_dump(mode="json"),
            "seed": config.lisa.seed,
            "ranks": args.world_size,
            "rows_per_batch": args.per_device_train_batch_size,
        },
        commit=records.commit(),
        versions=records.versions(),
    )
    engine.destroy()
    if args.process_index == 0:
        found.write(out)
        print(*_lines(found, out), sep="\n", flush=True)
    dist.barrier()
    return found


def _measuring(lisa: LisaConfig, score: str | None) -> LisaConfig:
    """The same section with a sampler that measures ``score``."""
    # Nothing trains.
    return lisa.model_copy(update={"interval_steps": 1, "growth": None, "sampler": lisa.sampler.measuring(score)})


def _check_target(out: Path) -> None:
    """Refuse a target that exists or cannot be written, before anything is loaded."""
    if out.exists():
        raise ConfigError(f"command line: --out: {out} exists already; remove it, or name another file")
    place = next(path for path in out.absolute().parents if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"command line: --out: {out} cannot be written: {place} is a file, or may not be written to")


def _batches(
    config: RunConfig, args: Any, rows: Any, collate: Callable[..., Any]
) -> Callable[[nn.Module], Iterator[Tensor]]:
    picked: list[int] = []
    size = rows_in_batch(config.lisa, args.per_device_train_batch_size)
    if config.lisa.sampler.calibrates:
        every = choose_rows(config.lisa, len(rows), size, args.world_size)
        picked = every[args.process_index :: args.world_size]

    def losses(module: nn.Module) -> Iterator[Tensor]:
        for begin in range(0, len(picked), size):
            batch = collate([rows[i] for i in picked[begin : begin + size]])
            loss: Tensor = module(**{key: value.to(args.device) for key, value in batch.items()}).loss
            yield loss

    return losses


def _finished(args: Any, model: nn.Module) -> dict[str, Any]:
    """The DeepSpeed config with ``auto`` replaced, as transformers does it."""
    deepspeed = args.hf_deepspeed_config
    deepspeed.trainer_config_process(args)
    deepspeed.trainer_config_finalize(args, model, 1)
    finished: dict[str, Any] = deepspeed.config
    finished.pop("optimizer", None)
    finished.pop("scheduler", None)
    return finished


def _lines(found: LayerScores, out: Path) -> list[str]:
    largest = max(found.scores) or 1.0
    bars = [
        f"{layer:5d}  {score:12.5g}  {'#' * round(40 * score / largest)}" for layer, score in enumerate(found.scores)
    ]
    return [
        f"{found.score} of {len(found.scores)} layers of {found.model}",
        "layer         score",
        *bars,
        f"wrote {out}",
    ]
