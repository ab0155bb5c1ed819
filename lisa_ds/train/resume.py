"""Finds the checkpoint that a run resumes from, and checks that it can."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments

from lisa_ds.config import RunConfig
from lisa_ds.errors import CheckpointError, ConfigError
from lisa_ds.integrations.order import differences
from lisa_ds.train import arguments

_log = logging.getLogger(__name__)


def find_checkpoint(config: RunConfig, resume: str | None) -> Path | None:
    """The checkpoint to resume from.

    Raises:
        CheckpointError: The one asked for is missing or incomplete.
        ConfigError: None is asked for, and ``output_dir`` holds another run's.
    """
    output_dir = arguments.output_dir(config)
    if resume not in (None, "auto"):
        path = Path(str(resume)).expanduser()
        if not path.is_dir():
            raise CheckpointError(f"--resume: no such directory: {path} (looked from {Path.cwd()})")
        if missing := _missing(path):
            raise CheckpointError(f"--resume: {path} is not a complete checkpoint of a run: it has no {missing}")
        if path.resolve().parent != output_dir.resolve():  # continued elsewhere
            _refuse_used(config, output_dir)
        return _of_this_world(path)
    if resume == "auto":
        for path in sorted(output_dir.glob("checkpoint-*"), key=_step, reverse=True):
            if not (missing := _missing(path)):
                return _of_this_world(path)
            _log.warning("--resume auto: passing over %s, which has no %s", path, missing)
        if (output_dir / "model").exists():
            raise CheckpointError(
                f"--resume auto: {output_dir} holds a finished run's model and no complete checkpoint to continue from; "
                "choose another directory"
            )
        return None
    _refuse_used(config, output_dir)
    return None


def tell(checkpoint: Path | None, resume: str | None, args: TrainingArguments) -> None:
    """Print on rank 0 where a resumed run goes on."""
    if resume is None or args.process_index != 0:
        return
    if checkpoint is None:
        print(f"--resume {resume}: no complete checkpoint in {args.output_dir}; the run begins at step 0", flush=True)
        return
    step, last = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"], args.max_steps
    rest = "; no step is left" if 0 < last <= step else ""
    print(f"--resume {resume}: going on from {checkpoint}, after step {step}{rest}", flush=True)


def _refuse_used(config: RunConfig, output_dir: Path) -> None:
    found = sorted(output_dir.glob("checkpoint-*"), key=_step, reverse=True)
    if found or (output_dir / "model").exists():
        raise ConfigError(
            f"{config.where('training.output_dir')}: {output_dir} holds another run's "
            f"{found[0].name if found else 'model'}; continue it with --resume auto, or choose another directory"
        )


def restore_patience(trainer: Any, checkpoint: Path | None) -> None:
    """Restore the patience counter of early stopping: the trainer saves it, but starts from 0 when it resumes."""
    if checkpoint is None:
        return
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback) and "EarlyStoppingCallback" in saved:
            waited = saved["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]
            callback.early_stopping_patience_counter = waited


def check_order(checkpoint: Path | None, order: dict[str, Any], *, begins_anew: bool) -> None:
    """Compare the order of rows with that of the run that saved the checkpoint.

    Args:
        checkpoint: The checkpoint to resume from, if there is one.
        order: This run's, from :func:`~lisa_ds.integrations.order.order_of`.
        begins_anew: Whether the run begins a new epoch instead of going on at the checkpoint's row
            (``ignore_data_skip``).

    Raises:
        CheckpointError: Rows would be left out, or seen twice.
    """
    if checkpoint is None or begins_anew:
        return
    saved = json.loads((checkpoint / "trainer_state.json").read_text()).get("stateful_callbacks", {}).get("RowOrder")
    if saved is None:
        _log.warning(
            "--resume: %s does not say in what order its rows came; if data, batch size or seed have changed, rows are left out or "
            "seen twice",
            checkpoint,
        )
        return
    if told := differences(saved["args"]["order"], order):
        raise CheckpointError(
            f"--resume: {checkpoint} was saved with {'; with '.join(told)}: rows would be left out, or seen twice. Go back to what it "
            "was saved with, or set training.ignore_data_skip: true to go on at the beginning of an epoch"
        )


def _of_this_world(checkpoint: Path) -> Path:
    saved, now = _ranks(checkpoint), int(os.environ["WORLD_SIZE"])
    if saved != now:
        raise CheckpointError(
            f"--resume: {checkpoint} was saved on {saved} ranks and cannot be resumed on {now}; run on {saved} ranks, or "
            "export it with `lisa-ds export` and start from the exported weights"
        )
    return checkpoint


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def _ranks(checkpoint: Path) -> int:
    if _is_whole(checkpoint):
        return max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    return len(list(checkpoint.glob(f"{(checkpoint / 'latest').read_text().strip()}/*_optim_states.pt")))


def _is_whole(checkpoint: Path) -> bool:
    """Whether it was saved without DeepSpeed, by rank 0 for all."""
    return not (checkpoint / "latest").is_file() and (checkpoint / "optimizer.pt").is_file()


def _missing(checkpoint: Path) -> str | None:
    """The first missing part of an incomplete checkpoint, in the order in which the trainer writes them."""
    if not _is_whole(checkpoint) and not (checkpoint / "latest").is_file():
        return "latest"
    ranks = _ranks(checkpoint)
    generators = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    if ranks == 0:
        return "*_optim_states.pt"
    return next((name for name in (*generators, "trainer_state.json") if not (checkpoint / name).is_file()), None)
