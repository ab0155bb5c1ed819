"""What a method of fine-tuning decides in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lisa_ds.config import RunConfig
from lisa_ds.config.stages import ZERO_STAGES


class Method:
    """A method of fine-tuning. By default every parameter trains, under DeepSpeed ZeRO-3."""

    name: ClassVar[str]
    """The name in run files."""

    exports_adapter: ClassVar[bool] = False
    """Whether what the trainer saves is an adapter, not the whole model."""

    taken: ClassVar[Mapping[str, str]] = {}
    """Keys of ``training`` that it sets itself, each with what to write instead."""

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO stages that it runs under, the default first; none where it runs without DeepSpeed."""
        return ZERO_STAGES[self.name]

    def check(self, config: RunConfig, model: Any) -> None:
        """Refuse what does not fit the model or this machine, before any weight or data is read.

        Args:
            config: The run.
            model: Its model, without weights.

        Raises:
            LisaError: Names the key, its value and the remedy.
        """

    def dtype(self, config: RunConfig) -> torch.dtype:
        """The type that weights are loaded in."""
        values = config.training_values()
        return torch.bfloat16 if values.bf16 else torch.float16 if values.fp16 else torch.float32

    def arguments(self, config: RunConfig) -> dict[str, Any]:
        """Arguments of ``transformers.TrainingArguments`` that the method sets, whatever ``training`` says."""
        return {}

    def wrap(self, config: RunConfig, model: Any, seed: int) -> Any:
        """The model that trains, made of the one that was loaded; every rank calls it.

        Args:
            config: The run.
            model: Its model, loaded.
            seed: Of what is drawn at random; equal on all ranks.

        Raises:
            LisaError: What the method reads (a saved adapter) does not fit the model.
        """
        return model

    def prepare(self, trainer: Any, config: RunConfig) -> None:
        """Change a trainer that has not trained yet.

        Raises:
            LisaError: The method cannot be applied to it.
        """

    def unreadable(self, config: RunConfig) -> str | None:
        """Why the statistics of layers cannot be recorded; None if they can."""
        return None
