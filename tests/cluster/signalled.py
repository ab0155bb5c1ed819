"""``launch/train.py``, but some ranks are signalled at known places, and steps and saves can be slow.

``SIGNALLED`` holds ``rank:place:signal`` entries, separated by commas. Places: ``load``, ``evaluate``, ``save``, ``exit``, or
the number of the step amid which it comes. It goes to the rank's process group, as Slurm signals all processes of a task.
``SLOW_STEP_S`` and ``SLOW_SAVE_S`` are seconds that a step, or amid its files a save, takes longer.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from lisa_ds.train import command

_PENDING = [entry.split(":") for entry in os.environ.get("SIGNALLED", "").split(",") if entry]


def _reach(place: str) -> None:
    for entry in [entry for entry in _PENDING if entry[0] == os.environ["RANK"] and entry[1] == place]:
        _PENDING.remove(entry)
        os.killpg(os.getpgrp(), signal.Signals[entry[2]])


def _patch() -> None:
    from lisa_ds.integrations.trainer import LabelLogitsTrainer
    from lisa_ds.train import run

    class Signalled(LabelLogitsTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            _reach(str(self.state.global_step + 1))
            time.sleep(float(os.environ.get("SLOW_STEP_S", 0)))
            return super().training_step(*args, **kwargs)

        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            _reach("evaluate")
            return super().prediction_step(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            _reach("save")
            super()._save_checkpoint(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            time.sleep(float(os.environ.get("SLOW_SAVE_S", 0)))  # some files are written, and others are not
            super()._save_optimizer_and_scheduler(output_dir)

    load = run.load_tokenizer

    def load_tokenizer(*args: Any) -> Any:
        _reach("load")
        return load(*args)

    run.LabelLogitsTrainer, run.load_tokenizer = Signalled, load_tokenizer


if __name__ == "__main__":
    prepare = command._prepare_environment

    def prepare_and_patch() -> None:
        prepare()
        _patch()

    command._prepare_environment = prepare_and_patch
    code = command.main()
    _reach("exit")
    sys.exit(code)
