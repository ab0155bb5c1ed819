"""A model that has passed all checks that need no weights, and how it is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from lisa_ds.checkpoint import adapters
from lisa_ds.checkpoint.export import DTYPES
from lisa_ds.config import RunConfig
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.evaluate.subject import Subject
from lisa_ds.models import check_weights, fitting_skeleton, load_model, load_tokenizer
from lisa_ds.train import fit


@dataclass(frozen=True)
class Opened:
    """A subject with its tokenizer; made by :func:`open_subject`."""

    subject: Subject
    config: RunConfig
    tokenizer: Any

    shape: Any
    """The model without its weights; of an adapter, its base, with a head for the adapter's classes."""

    def load(self, dtype: str | None) -> Any:
        """The model, in evaluation mode, on this rank's device.

        Args:
            dtype: A name of :data:`~lisa_ds.checkpoint.export.DTYPES`; None for what the model's weights are stored in, in which
                an adapter is computed too.

        Raises:
            ModelError: Weights or adapter cannot be read, or do not belong together.
        """
        model = load_model(self.config.model, DTYPES[dtype] if dtype else None)
        if self.subject.adapter is not None:
            model = adapters.loaded(model, self.subject.adapter)
        return model.eval().to(device())


def open_subject(subject: Subject, config: RunConfig, *, any_text: bool) -> Opened:
    """Check model and tokenizer without reading weights.

    Args:
        subject: The model.
        config: Its model and data.
        any_text: Whether it will read other texts than the run's rows, so that any of its tokens may come up.

    Raises:
        ModelError: One is missing, or they do not belong together; or an adapter is damaged, incomplete or of another base.
        ConfigError: A classifier is to read any text, of which it makes none.
    """
    if any_text and config.model.task != "causal_lm":
        raise ConfigError(f"{config.where('model.task')}: a classifier answers no prompts, got {config.model.task!r}")
    if subject.adapter is not None:
        named = adapters.with_classes(config.model, subject.adapter)
        config = config.model_copy(update={"model": named})
    shape = fitting_skeleton(config.model)
    check_weights(config.model)
    if subject.adapter is not None:
        adapters.check(shape, subject.adapter)
    own = subject.adapter is not None and (subject.adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(config.model, str(subject.adapter) if own else None)
    rows = shape.get_input_embeddings().num_embeddings
    if any_text and len(tokenizer) > rows:
        raise ModelError(
            f"{subject.name}: its tokenizer knows {len(tokenizer)} tokens, and its embedding has {rows} rows; use the tokenizer that "
            "belongs to it, or add rows with resize_token_embeddings"
        )
    fit.check_rows(config, shape, tokenizer)
    return Opened(subject, config, tokenizer, shape)


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
