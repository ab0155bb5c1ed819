"""Saves a LISA run's progress in DeepSpeed's checkpoints, resumes from them, and starts new runs from their weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from torch import nn

from lisa_ds.engines.common import adapters
from lisa_ds.engines.common.progress import Progress
from lisa_ds.engines.common.protocol import Engine
from lisa_ds.engines.common.run import LisaRun
from lisa_ds.engines.zero3.checkpoint import files
from lisa_ds.engines.zero3.checkpoint.warm_start import load_weights
from lisa_ds.engines.zero3.optimizer.window import WindowedStage3
from lisa_ds.engines.zero3.scoring import side_backward
from lisa_ds.errors import CheckpointError

logger = logging.getLogger("lisa_ds")


class Checkpoints:
    """Saving and loading for one engine.

    Args:
        engine: The engine, which trains the run's units.
        run: The run that is saved and resumed.
        optimizer: The engine's optimizer.
        module: The engine's model.
        tensor_size: Ranks that share each layer.
    """

    def __init__(
        self, engine: Engine, run: LisaRun, optimizer: WindowedStage3, module: nn.Module, tensor_size: int
    ) -> None:
        self._engine, self._run, self._optimizer, self._module = engine, run, optimizer, module
        self._tensor_size = tensor_size

    def client_state(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """The client state to save: the caller's, and the run's progress."""
        rule = adapters.rule_of(self._module)
        progress = self._run.progress(self._engine).as_dict()
        return {**(given or {}), files.KEY: progress, **({files.ADAPTERS: rule.as_dict()} if rule else {})}

    def prepare(self, paths: Sequence[Path]) -> Progress:
        """Check this rank's files, and switch to the units whose state they hold, so that DeepSpeed can load it.

        Raises:
            CheckpointError: A file is missing, truncated, of another model, world size or policy, or not written by lisa_ds.
                Nothing has been changed on any rank.
        """
        progress = files.peek(paths, self._run.refusal, world_size=dist.get_world_size(), tensor_size=self._tensor_size)
        self._optimizer.forget_second_copies()
        # Frozen parameters are read by name from the file: the frozen set must be the saved one before they are.
        roles = self._engine.sampled_roles if progress.roles is None else progress.roles
        self._engine.train_units(progress.sampled, roles)
        return progress

    def go_on(self, progress: Progress, directory: Path) -> None:
        """Resume the schedule from ``progress``, once DeepSpeed has loaded everything else."""
        if not self._run.resume(self._engine, progress, directory) and dist.get_rank() == 0:
            logger.warning(
                "%s: was saved under another seed, sampler, number of layers or interval; from the next interval on, this "
                "run's are drawn",
                directory,
            )

    def start_warm(self, directory: Path) -> None:
        """Warm start: load the weights alone, from a checkpoint of any number of ranks, and restart the schedule.

        Raises:
            CheckpointError: It is missing, truncated or of another model, or ranks share layers. Nothing has been changed on any rank.
        """
        if self._tensor_size > 1:
            raise CheckpointError(
                f"{directory}: without optimizer states a checkpoint is read by whole layers, but here {self._tensor_size} ranks "
                "share each; load its weights into the model before initialize"
            )
        self._optimizer.forget_second_copies()
        with side_backward.partitioned(self._optimizer):
            load_weights(self._module, directory)
        self._run.begin_anew(self._engine)
        self._optimizer.refresh_fp32_params()
        self._optimizer.unit_state.forget_moments()
