"""Corrects the means in a trainer's log entries: only over steps that were applied, and rows that have labels.

DeepSpeed skips a step whose gradient is not finite, and the trainer counts a share of the earlier losses in place of
its loss. Rows whose labels are all ignored have no loss, and the trainer does not report them. Here an entry's loss is
the mean over the steps that changed the weights, and entries count what is left out.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lisa_ds.integrations.sharing import tensor_parallel_size

SKIPPED, UNLABELLED, NOT_FINITE = "skipped_steps", "rows_without_labels", "rows_not_finite"
"""Keys of log entries, present if they are not 0: steps and rows since the entry before, rows of all ranks. Those of an
evaluation begin with ``eval_``. The last one is of evaluations alone: rows of batches whose loss is not finite, which
their mean leaves out."""

_IGNORED = -100
_LOSS, _SHARE, _WITHOUT, _ROWS = range(4)
"""Counts of a step: losses, the share of its micro-batches that have one, those that have none, rows without labels."""

_MEANING = {
    SKIPPED: "skipped, as their gradients were not finite: they moved no weight, and their losses are in no mean",
    UNLABELLED: f"whose labels are all {_IGNORED}: nothing is learned from them",
    NOT_FINITE: "in batches whose loss is not finite, left out of the mean",
}
_log = logging.getLogger("lisa_ds")


def keep_tally(trainer: Any) -> Tally:
    """Have ``trainer`` log means over applied steps, and count the rest; calling it again has no effect.

    Args:
        trainer: A ``transformers.Trainer`` or subclass that is not training.
    """
    callbacks = trainer.callback_handler.callbacks
    found = next((callback for callback in callbacks if isinstance(callback, Tally)), None)
    if found is None:
        found = Tally(trainer)
        callbacks.insert(0, found)  # trackers see what is added
    return found


class Tally(TrainerCallback):
    """Counts what a trainer's losses are means of; made by :func:`keep_tally`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._told: set[str] = set()
        self._begin(0)
        for name, around in (
            ("training_step", self._around_training_step),
            ("_maybe_log_save_evaluate", self._around_logging),
            ("prediction_step", self._around_prediction_step),
        ):
            stock = getattr(trainer, name)
            setattr(trainer, name, functools.wraps(stock)(functools.partial(around, stock)))

    def _begin(self, step: int) -> None:
        self._first_step = self._step = step
        self._skipped = self._skipped_before = 0  # in this train(), and of them in entries
        self._of_step = self._of_entry = torch.zeros(
            4, dtype=torch.float64
        )  # on this rank: of the step in progress, of those since
        self._logged, self._of_entries = [0.0] * 4, [0.0] * 4  # on all ranks: of the last entry, of all
        self._differs = False  # from the trainer's means
        self._evaluated: Tensor | None = None  # rows without labels and of losses not finite, on all ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset all counts."""
        self._begin(state.global_step)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Reset the counts of a prediction, which has no log entry."""
        self._evaluated = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Add the counts that are not 0, and remove a mean over no losses."""
        if "train_loss" in logs and state.global_step == self._first_step:  # resumed where nothing was left to train
            for entry in (logs, state.log_history[-1]):
                del entry["train_loss"]
        prefix = next((key.removesuffix("runtime") for key in logs if key.endswith("_runtime")), "")
        if "loss" in logs:
            counts = {SKIPPED: self._skipped - self._skipped_before, UNLABELLED: self._rows(self._logged)}
            self._skipped_before = self._skipped
        elif prefix not in ("", "train_"):
            found = [0, 0] if self._evaluated is None else self._evaluated.tolist()
            counts = dict(zip((prefix + UNLABELLED, prefix + NOT_FINITE), found, strict=True))
            self._evaluated = None
        else:
            return
        counts = {key: count for key, count in counts.items() if count}
        logs.update(counts)
        state.log_history[-1].update(counts)  # Trainer has copied the entry already
        if state.is_world_process_zero:
            self._tell(state.global_step, counts)

    def unlabelled(self) -> int:
        """Rows without labels that all ranks were given since the start or resume; every rank calls it."""
        return self._rows(self._of_entries) + self._rows(self._on_all_ranks(self._of_entry))

    def _tell(self, step: int, counts: Mapping[str, int]) -> None:
        """Log an explanation of each count when it is first not 0."""
        for key, count in counts.items():
            if key not in self._told:
                self._told.add(key)
                meaning = next(text for name, text in _MEANING.items() if key.endswith(name))
                _log.warning("step %d: %s: %d, %s", step, key, count, meaning)

    def _around_training_step(
        self, stock: Callable[..., Tensor], model: Any, inputs: Any, items: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        unlabelled = self._unlabelled_rows(inputs)
        loss = stock(model, inputs, items, *args, **kwargs)
        rows, counts = loss.new_zeros(()), loss.new_ones(())
        if unlabelled is not None:
            rows = unlabelled.sum().to(loss)
            # Divided by the labels of the step, the loss of a batch without any is 0; by its own, it is none, also of a model
            # that is given the step's number and has no use for it.
            labelled = ~unlabelled.all()
            by_step = False if items is None else (torch.as_tensor(items, device=loss.device) > 0) & loss.isfinite()
            counts = (labelled | by_step).to(loss)
        share = counts / getattr(self._trainer, "current_gradient_accumulation_steps", 1)
        counted = torch.stack([torch.where(counts > 0, loss, 0.0), share, 1 - counts, rows])
        self._of_step = self._of_step.to(loss.device) + counted.double()
        return loss

    def _around_logging(self, stock: Callable[..., None], tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Scale the loss, so that the trainer, which divides by all steps, logs the mean over those that count."""
        trainer, now = self._trainer, self._trainer.state.global_step
        if now > self._step:
            if trainer.accelerator.optimizer_step_was_skipped:
                self._skipped += 1
                self._of_step[:_ROWS] = 0
            self._of_entry = self._of_entry.to(self._of_step.device) + self._of_step
            self._step, self._of_step = now, torch.zeros_like(self._of_step)
        steps = now - trainer._globalstep_last_logged
        if trainer.control.should_log and steps:
            self._logged, self._of_entry = self._on_all_ranks(self._of_entry), torch.zeros_like(self._of_entry)
            self._of_entries = [before + new for before, new in zip(self._of_entries, self._logged, strict=True)]
            self._differs |= self._skipped > 0 or bool(self._logged[_WITHOUT]) or not math.isfinite(self._logged[_LOSS])
            if self._differs:  # otherwise the trainer's own sum is right
                tr_loss.fill_(_mean(self._logged) * steps)
        stock(tr_loss, *args, **kwargs)
        if now >= trainer.state.max_steps or trainer.control.should_training_stop:  # what follows is train_loss
            rest = self._on_all_ranks(self._of_entry)
            counted = [before + new for before, new in zip(self._of_entries, rest, strict=True)]
            self._differs |= self._skipped > 0 or bool(rest[_WITHOUT]) or not math.isfinite(rest[_LOSS])
            if self._differs:
                trainer._total_loss_scalar = _mean(counted) * (now - self._first_step)
                tr_loss.zero_()

    def _on_all_ranks(self, counted: Tensor) -> list[float]:
        total: Tensor = self._trainer.accelerator.reduce(counted.to(self._trainer.args.device), "sum")
        return total.tolist()

    def _rows(self, counted: list[float]) -> int:
        return round(counted[_ROWS]) // tensor_parallel_size(
            self._trainer.args
        )  # ranks that share a layer see the same ones

    def _around_prediction_step(
        self, stock: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        unlabelled = self._unlabelled_rows(inputs)
        result = stock(model, inputs, *args, **kwargs)
        loss = result[0]
        if unlabelled is not None and loss is not None:
            not_finite = ~unlabelled & ~loss.isfinite().all()
            # Per row, as the trainer gathers losses: of the last batch it drops those that only fill it up.
            rows: Tensor = self._trainer.gather_function(torch.stack([unlabelled, not_finite], dim=1).long()).sum(0)
            self._evaluated = rows if self._evaluated is None else self._evaluated + rows
        return result

    def _unlabelled_rows(self, inputs: Any) -> Tensor | None:
        """``(B,)``: which rows of a batch have no label; None if it has no labels at all."""
        if not isinstance(inputs, Mapping):
            return None
        labels, shifts = inputs.get("labels"), getattr(self._trainer, "_loss_shifts_labels", False)
        if "shift_labels" in inputs:
            labels, shifts = inputs["shift_labels"], False
        if not isinstance(labels, Tensor) or not labels.dim():
            return None
        if shifts:  # nothing predicts the first token
            labels = labels[..., 1:]
        return (labels.reshape(len(labels), -1) == _IGNORED).all(dim=1)


def _mean(counted: list[float]) -> float:
    return counted[_LOSS] / counted[_SHARE] if counted[_SHARE] else math.nan
