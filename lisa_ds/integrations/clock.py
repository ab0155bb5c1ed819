"""Times a trainer's phases: training, waiting for data within it, evaluations and checkpoints."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

TRAINING, WAITING = "training", "waiting for data"
_APART = {"evaluate": "evaluating", "_save_checkpoint": "saving", "_load_best_model": "loading the best model"}
"""Methods of a trainer that are not training, each with the name of its phase."""


class Clock(TrainerCallback):
    """Adds up the seconds of a trainer's phases from the start of training to its end, on this rank.

    All of that time is in some phase: what is not one of the others is training, callbacks and logging included.

    Args:
        trainer: A ``transformers.Trainer`` or subclass that is not training.
    """

    def __init__(self, trainer: Any) -> None:
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None  # not training
        self._since = 0.0
        self.moves = 0
        """Grows whenever the trainer makes progress: with each phase, and with each batch of an evaluation."""
        stock: Callable[..., Any] = trainer.get_batch_samples

        @functools.wraps(stock)
        def get_batch_samples(batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            return stock(self._waiting_for(batches), *args, **kwargs)

        trainer.get_batch_samples = get_batch_samples
        for name, phase in _APART.items():
            setattr(trainer, name, self._timed(getattr(trainer, name), phase))

    @property
    def phase(self) -> str:
        """The phase the trainer is in now."""
        return self._phase or "not in training"

    @property
    def training(self) -> float:
        """Seconds of training so far, waiting for data included."""
        return self._of(TRAINING) + self.waiting

    @property
    def waiting(self) -> float:
        """Seconds in which training waited for batches."""
        return self._of(WAITING)

    @property
    def apart(self) -> float:
        """Seconds of evaluations and checkpoints."""
        return sum(map(self._of, _APART.values()))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._enter(TRAINING)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self._enter(None)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch of an evaluation."""
        self.moves += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside the ``with``, time counts as ``phase``, if this is within training."""
        before = self._phase
        if before is not None:
            self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: str | None) -> None:
        now = time.perf_counter()
        self.moves += 1
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def _of(self, phase: str) -> float:
        running = time.perf_counter() - self._since if phase == self._phase else 0.0
        return self._seconds.get(phase, 0.0) + running

    def _waiting_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.during(WAITING):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def _timed(self, stock: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(stock)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return stock(*args, **kwargs)

        return timed
