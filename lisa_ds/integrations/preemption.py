"""A trainer callback that saves a checkpoint and stops when the scheduler preempts the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import TrainingArguments

from lisa_ds.cluster.preemption import Preempted, Preemption

_STATE = "trainer_state.json"  # what the trainer writes last: without it a checkpoint is not complete


class PreemptionCallback(TrainerCallback):
    """Ends ``trainer.train()`` by :class:`~lisa_ds.cluster.preemption.Preempted` after the step in which a signal came.

    The step is logged, and an evaluation that is due after it takes place: a resumed run would not repeat either. Then
    a checkpoint is saved, whatever ``save_strategy`` says. Before the first step there is nothing to save. In the last
    step of an epoch this waits for what the trainer does at the epoch's end; a run that early stopping has ended may
    finish.

    Args:
        preemption: The signals received. All ranks ask it at the same places.
        resumed_from: The checkpoint that the run continues.
    """

    def __init__(self, preemption: Preemption, resumed_from: Path | None = None) -> None:
        self._preemption = preemption
        self._resumed_from = resumed_from
        self._before_first_step = False
        self._training = False
        self._stopping = 0
        self._saved_step = self._requested_step = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop at once if a signal came while everything was loaded."""
        self._training = self._before_first_step = True
        self._leave_empty_handed(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop within the evaluation before training; no other evaluation is interrupted."""
        if self._before_first_step:
            self._leave_empty_handed(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note that from here on there is something to save."""
        self._before_first_step = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask whether a signal came; if so, have the trainer save."""
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if self._hears() and not (ends_epoch or control.should_training_stop):
            self._request_save(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do what was put off from the last step of an epoch, or of the run."""
        if self._stopping and not _stops_early(state, control):
            if self._saved_step == state.global_step and not control.should_evaluate:
                raise Preempted(state.global_step, _checkpoint(args, state), self._stopping)
            self._request_save(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An evaluation can take long: ask again, rather than after another step."""
        if not self._training or self._before_first_step or self._stopping:
            return
        if self._hears() and not _stops_early(state, control):
            self._request_save(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop, if this was the save that was requested."""
        self._saved_step = state.global_step
        if self._requested_step == state.global_step and not _stops_early(state, control):
            raise Preempted(state.global_step, _checkpoint(args, state), self._stopping)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do not stop from here on: what follows is short."""
        self._training = False

    def _hears(self) -> bool:
        self._stopping = self._preemption.agreed()
        return bool(self._stopping)

    def _leave_empty_handed(self, state: TrainerState) -> None:
        if self._hears():
            raise Preempted(state.global_step, self._resumed_from, self._stopping)

    def _request_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        self._requested_step = state.global_step
        control.should_log = control.should_save = True
        if args.save_strategy == SaveStrategy.BEST:  # it would save only if the evaluation is the best so far
            args.save_strategy = SaveStrategy.STEPS
        args.save_only_model = False
        if state.is_world_process_zero:  # a checkpoint that is written over is not complete until it is done
            (_checkpoint(args, state) / _STATE).unlink(missing_ok=True)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _stops_early(state: TrainerState, control: TrainerControl) -> bool:
    """Whether early stopping has ended the run: if resumed, it would train on."""
    return bool(control.should_training_stop) and state.global_step < state.max_steps
