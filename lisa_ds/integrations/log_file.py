"""Writes what a trainer logs to ``log.jsonl`` in its output directory; see :mod:`lisa_ds.run_log`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lisa_ds import records, run_log
from lisa_ds.errors import DataError
from lisa_ds.integrations.clock import Clock

_SECONDS = "lisa_ds_seconds_of_training"
"""Key among a checkpoint's states of callbacks. It is no callback's name, so the trainer leaves it as it is."""

_log = logging.getLogger(__name__)


class LogFile(TrainerCallback):
    """Appends every log entry to ``log.jsonl``, on rank 0.

    Add it behind the callbacks that add to entries, which go before the trainer's own, and before ``trainer.train()``.
    A checkpoint holds the seconds of training so far, from which a resumed run goes on.

    Args:
        clock: Of the same trainer.
        config: The run's config, with which its file can be read alone.
        device: The hardware, in words.
    """

    def __init__(self, clock: Clock, config: Mapping[str, Any], device: str) -> None:
        self._clock = clock
        self._config, self._device = dict(config), device
        self._before = 0.0  # seconds of training before this train()
        self._writer: run_log.Writer | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training since the run's start."""
        return self._before + self._clock.training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what runs, and from which step on."""
        path = Path(args.output_dir) / run_log.FILE_NAME
        before = _seconds_before(state, path)
        self._before = before - self._clock.training
        if not state.is_world_process_zero:
            return
        start = run_log.Start(
            config=self._config,
            steps=state.max_steps,
            world_size=args.world_size,
            device=self._device,
            commit=records.commit(),
            versions=records.versions(),
        )
        try:
            self._writer = run_log.Writer(path)
            self._writer.begin(state.global_step, state.epoch or 0.0, before, start)
        except OSError as error:
            self._give_up(path, error)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the seconds saved by a checkpoint of this step."""
        state.stateful_callbacks[_SECONDS] = {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Write the entry."""
        if self._writer is None:
            return
        entry = {**state.log_history[-1], **logs}  # transformers' printer takes out what it does not print
        try:
            self._writer.append(state.global_step, state.epoch or 0.0, self.seconds, entry)
        except OSError as error:
            self._give_up(Path(args.output_dir) / run_log.FILE_NAME, error)

    def _give_up(self, path: Path, error: OSError) -> None:
        # The run is worth more than its log, which its checkpoints hold as well.
        _log.warning("%s: cannot be written, so entries are no longer logged to it: %s", path, error.strerror)
        self._writer = None


def _seconds_before(state: Any, path: Path) -> float:
    """Seconds of training before the step that ``state`` goes on from: its checkpoint's, or what the file says."""
    if not state.global_step:
        return 0.0
    saved = state.stateful_callbacks.get(_SECONDS)
    if isinstance(saved, dict):
        return float(saved["attributes"]["seconds"])
    try:
        entries = run_log.read(path).entries
    except DataError:  # a checkpoint of an earlier release, continued elsewhere
        return 0.0
    return max((float(entry["seconds"]) for entry in entries if entry["step"] <= state.global_step), default=0.0)
