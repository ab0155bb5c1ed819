"""Checks that model and data fit, before any weight is read: token ids and embeddings, row lengths and positions."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc

from lisa_ds.config import RunConfig
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.layers import LayerStack
from lisa_ds.memory import ModelShape
from lisa_ds.models.adapters import numels
from lisa_ds.models.positions import most_positions, trained_positions

_log = logging.getLogger(__name__)


def shape_of(model: Any, config: RunConfig) -> ModelShape:
    """The shape of a model, or of its skeleton, with the units that its method draws; before adapters are added."""
    by_lisa = config.method == "lisa"
    alone = config.lisa.model_copy(update={"adapters": None})
    stack = LayerStack.of_run(model, alone) if by_lisa else LayerStack.from_model(model, config.lisa.layers_path)
    of_blocks = len(stack.layers) if stack.by_matrices else None
    shape = ModelShape.from_numels(stack.numels(), tied=stack.tied, of_blocks=of_blocks)
    return replace(shape, adapters=tuple(numels(model, config.lisa))) if by_lisa else shape


def check_length(config: RunConfig, model: Any) -> None:
    """Check ``data.max_length``, if it is given, against the positions that the model has or was trained for.

    Args:
        config: The run.
        model: Its model, without weights.

    Raises:
        ConfigError: The model has a table of positions, which is shorter.
    """
    length, where = config.data.max_length, config.where("data.max_length")
    most = most_positions(model)
    if most is not None:
        if length > most and "max_length" in config.data.model_fields_set:
            raise ConfigError(
                f"{where}: {config.model.name_or_path!r} has a table of {most} positions and reads no longer row, got {length}; set "
                f"it to {most} or less"
            )
        return
    trained = trained_positions(model.config)
    if trained is not None and length > trained:
        _tell(
            f"{where}: {length} is beyond the {trained} positions that {config.model.name_or_path!r} was made for (max_position_embeddings "
            "and scaling in its config.json): it has learned nothing of those beyond; set it lower, or give the model a rope scaling"
        )


def check_rows(config: RunConfig, model: Any, tokenizer: Any, *data_sets: Any) -> None:
    """Check the tokens of all rows against the embedding's size, and the longest row against the model's positions.

    Raises:
        ModelError: A token, or the padding token, has no row in the embedding.
        ConfigError: A row is longer than the model's table of positions.
    """
    rows = model.get_input_embeddings().num_embeddings
    name, where = config.model.name_or_path, config.where("model.name_or_path")
    most = most_positions(model)
    for table in (rows_of.with_format("arrow")[:] for rows_of in data_sets if rows_of is not None):
        highest = pc.max(pc.list_flatten(table["input_ids"])).as_py()
        if highest is not None and highest >= rows:
            raise ModelError(
                f"{where}: the embedding of {name!r} has {rows} rows, but its tokenizer makes token {highest} "
                f"({tokenizer.convert_ids_to_tokens(highest)!r}) of the data, of {len(tokenizer)} that it knows; {_REMEDY}"
            )
        longest = pc.max(pc.list_value_length(table["input_ids"])).as_py()
        if most is not None and longest is not None and longest > most:
            raise ConfigError(
                f"{config.where('data.max_length')}: {name!r} has a table of {most} positions, and a row has {longest} tokens; set it "
                f"to {most} or less"
            )
    if tokenizer.pad_token_id >= rows:
        raise ModelError(
            f"{where}: the embedding of {name!r} has {rows} rows, and its tokenizer pads with token {tokenizer.pad_token_id} "
            f"({tokenizer.pad_token!r}); {_REMEDY}, or set pad_token in its tokenizer_config.json to one that has a row"
        )


_REMEDY = "add rows with resize_token_embeddings and save the model, or use the tokenizer that belongs to it"


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _log.warning(text)
