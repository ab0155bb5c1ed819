"""Times the phases of a trainer's steps: forward, backward, the optimizer, and LISA's switches.

On a GPU nothing is waited for: the phases are between CUDA events on the stream that computes, which are read when an
entry is logged and the trainer waits for the loss anyway. On the CPU they are between readings of a clock. On other
devices, whose work is not over when a call returns, entries have none of these keys.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from lisa_ds.run_log import PHASES

FORWARD, BACKWARD, OPTIMIZER, SWITCH = PHASES.values()
"""The keys of a log entry: seconds of an optimizer step on this rank, mean since the entry before.

What an activation checkpoint computes again counts as backward, as does the reduction of gradients as far as backward
waits for it. Clipping is the optimizer's, and so is what DeepSpeed's ``step`` does beside. ``switch_s`` is the draw of layers and
the change to them, with the passes that measure scores; it is missing where no engine of LISA trains. An optimizer that
steps inside backward (transformers' ``_layerwise``) is in ``backward_s``. Data, logging, evaluations and checkpoints are in none.
"""


class Phases(TrainerCallback):
    """Adds the keys of :data:`~lisa_ds.run_log.PHASES` to the entries of training steps.

    Args:
        trainer: A ``transformers.Trainer`` or subclass that is not training, under DeepSpeed or without. This goes
            before its other callbacks, so that trackers see what is added.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        stopwatches: dict[str, _Stopwatch] = {"cpu": _Host(), "cuda": _Cuda()}
        self._stopwatch = stopwatches.get(trainer.args.device.type)
        self._phase: str | None = None
        self._since: Any = None
        self._spans: deque[tuple[str, Any, Any]] = deque()  # those not added up yet
        self._seconds: dict[str, float] = {}
        self._logged = 0  # step of the last entry
        self._uninstall: list[Callable[[], Any]] = []
        if self._stopwatch is None:
            return
        compute_loss: Callable[..., Any] = trainer.compute_loss

        @functools.wraps(compute_loss)
        def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not model.training:  # an evaluation
                return compute_loss(model, *args, **kwargs)
            with self._during(FORWARD):
                return compute_loss(model, *args, **kwargs)

        trainer.compute_loss = timed
        self._time(trainer.accelerator, "backward", BACKWARD)
        self._time(trainer.accelerator, "clip_grad_norm_", OPTIMIZER)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find what steps, now that it exists."""
        self._logged = state.global_step
        self._seconds.clear()
        if self._stopwatch is None:
            return
        self._seconds.update(dict.fromkeys((FORWARD, BACKWARD, OPTIMIZER), 0.0))
        engine = self._trainer.deepspeed
        found = [(self._trainer.optimizer, "step", OPTIMIZER)] if engine is None else [(engine, "step", OPTIMIZER)]
        if hasattr(engine, "count_step"):  # LISA's
            found.append((engine, "count_step", SWITCH))
            self._seconds[SWITCH] = 0.0
        self._uninstall = [self._time(*place) for place in found]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Release the engine."""
        while self._uninstall:
            self._uninstall.pop()()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Add up what a GPU has done by now, without waiting."""
        self._add_up(wait=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Add the means since the last entry."""
        steps = state.global_step - self._logged
        if "loss" not in logs or not steps or self._stopwatch is None:
            return
        self._add_up(wait=True)
        means = {key: round(seconds / steps, 6) for key, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._logged = state.global_step
        logs.update(means)
        state.log_history[-1].update(means)  # Trainer has copied the entry already

    def _time(self, owner: Any, name: str, phase: str) -> Callable[[], Any]:
        """Time a method of ``owner`` as ``phase``; returns what undoes it."""
        stock: Callable[..., Any] = getattr(owner, name)
        had = name in vars(owner)  # what learning-rate schedulers put over an optimizer's own

        @functools.wraps(stock)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._during(phase):
                return stock(*args, **kwargs)

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, stock) if had else delattr(owner, name)

    @contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        """Inside the ``with``, time counts as ``phase``, and not as the one around it."""
        around = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(around)

    def _enter(self, phase: str | None) -> None:
        assert self._stopwatch is not None
        now = self._stopwatch.now()
        if self._phase is not None:
            self._spans.append((self._phase, self._since, now))
        self._phase, self._since = phase, now

    def _add_up(self, *, wait: bool) -> None:
        while self._spans and self._stopwatch is not None:
            phase, begin, end = self._spans[0]
            if not self._stopwatch.is_over(end, wait=wait):
                return
            self._spans.popleft()
            if phase in self._seconds:
                self._seconds[phase] += self._stopwatch.between(begin, end)


class _Stopwatch(Protocol):
    def now(self) -> Any:
        """This moment, in what is computed."""

    def is_over(self, moment: Any, *, wait: bool) -> bool:
        """Whether it has come."""

    def between(self, begin: Any, end: Any) -> float:
        """Seconds."""


class _Host:
    def now(self) -> float:
        return time.perf_counter()

    def is_over(self, moment: float, *, wait: bool) -> bool:
        return True

    def between(self, begin: float, end: float) -> float:
        return end - begin


class _Cuda:
    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_over(self, moment: torch.cuda.Event, *, wait: bool) -> bool:
        if wait:
            moment.synchronize()
        return bool(moment.query())  # type: ignore[no-untyped-call]

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3
