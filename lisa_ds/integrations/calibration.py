"""Calibration batches, on which a trainer's layers are scored: the same rows of its training data throughout a run."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError


class CalibrationBatches:
    """``lisa.sampler.calibration_batches`` batches for each rank, and their losses as the trainer computes them.

    Rows are chosen once by ``lisa.seed``, and batched as for training; for the empirical Fisher information one by one.

    Args:
        trainer: A ``transformers.Trainer``.
        config: Its LISA section.
    """

    def __init__(self, trainer: Any, config: LisaConfig) -> None:
        self._trainer, self._config = trainer, config
        self._batches: list[Any] | None = None

    def __call__(self, module: nn.Module) -> Iterator[Tensor]:
        """Yield the loss of each batch of this rank."""
        if self._batches is None:
            self._batches = self._load()
        for batch in self._batches:
            yield self._loss(module, batch)

    def _loss(self, module: nn.Module, batch: Any) -> Tensor:
        trainer = self._trainer
        metrics = getattr(trainer, "_metrics", None)
        if metrics is not None:  # TRL's trainers note accuracies there, for their next evaluation
            trainer._metrics = copy.deepcopy(metrics)
        try:
            loss: Tensor = trainer.compute_loss(module, trainer._prepare_inputs(dict(batch)))
        finally:
            if metrics is not None:
                trainer._metrics = metrics
        return loss

    def _load(self) -> list[Any]:
        trainer, chosen = self._trainer, self._config.sampler
        data, args = trainer.train_dataset, trainer.args
        if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
            raise ConfigError(
                f"{self._config.where('sampler.name')}: {chosen.name!r} scores layers on rows of the training data, which is a "
                "stream here; profile the model beforehand with `lisa-ds profile` and use 'fixed_scores', or another sampler"
            )
        size = rows_in_batch(self._config, args.per_device_train_batch_size)
        rows = choose_rows(self._config, len(data), size, args.world_size)
        # The trainer's own way from rows to batches, for its columns, its collator and its ranks.
        before = args.per_device_eval_batch_size
        args.per_device_eval_batch_size = size
        try:
            return list(trainer.get_test_dataloader(_subset(data, rows)))
        finally:
            args.per_device_eval_batch_size = before


def rows_in_batch(config: LisaConfig, batch_size: int) -> int:
    """Rows of a calibration batch: as for training, but one by one for the empirical Fisher information."""
    return 1 if config.sampler.kind.by_row else batch_size


def choose_rows(config: LisaConfig, num_rows: int, size: int, ranks: int) -> list[int]:
    """The rows of all ranks' calibration batches of ``size``, chosen by ``lisa.seed``.

    Raises:
        ConfigError: The data has fewer.
    """
    count = config.sampler.calibration_batches
    wanted = count * size * ranks
    if wanted > num_rows:
        raise ConfigError(
            f"{config.where('sampler.calibration_batches')}: {count} batches of {size} rows on {ranks} ranks are {wanted} rows, "
            f"and the training data has {num_rows}"
        )
    return random.Random(f"calibration/{config.seed}").sample(range(num_rows), wanted)


def _subset(data: Any, rows: list[int]) -> Any:
    return data.select(rows) if hasattr(data, "select") else torch.utils.data.Subset(data, rows)
