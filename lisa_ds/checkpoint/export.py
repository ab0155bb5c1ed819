"""Exports a training checkpoint to a directory that ``from_pretrained`` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from lisa_ds.checkpoint import adapters, names
from lisa_ds.checkpoint.directories import appearing, copy_generation_config, copy_tokenizer, refuse_taken
from lisa_ds.errors import CheckpointError, ModelError
from lisa_ds.models import resolve

ReadWeights = Callable[[Path, torch.dtype], dict[str, Tensor]]
"""An engine's reader: from the checkpoint and a dtype to whole (not partitioned) parameters by name."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    checkpoint: Path,
    out: Path,
    read_weights: ReadWeights,
    *,
    model: str | None = None,
    dtype: str | None = None,
    merged: bool = False,
) -> None:
    """Write weights as safetensors, with config and tokenizer; for a PEFT model, the adapter alone or the merged model.

    Args:
        checkpoint: The directory of a checkpoint.
        out: The directory to write. It appears whole or not at all; before, it must be absent or empty.
        read_weights: The reader of the engine that wrote the checkpoint.
        model: Where config and tokenizer are taken from if the checkpoint does not hold them: a name or a directory.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default the one in the config.
        merged: Whether to merge the adapter of a PEFT model into it.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete, has no adapter to merge, or ``out`` is taken. Nothing has been written.
        ModelError: Config and weights are not of the same model.
    """
    refuse_taken(out)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such directory (looked from {Path.cwd()})")
    adapter = adapters.config_beside(checkpoint)
    if merged and adapter is None:
        raise CheckpointError(f"{checkpoint}: {adapters.NO_CONFIG}, so there is nothing to merge")
    base = model or (adapter and adapter.base_model_name_or_path)
    source = resolve(base) if base else str(_beside_weights(checkpoint))
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: no config of a model could be loaded: {' '.join(str(error).split())}") from error
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True  # trainers switch it off and save it so, but nobody wants to generate without
    chosen = DTYPES[dtype] if dtype else (getattr(config, "dtype", None) or torch.float32)
    architecture = (config.architectures or ["none"])[0]
    if not hasattr(transformers, architecture):
        raise ModelError(
            f"{source}: its config names the architecture {architecture!r}, which transformers does not have"
        )
    with torch.device("meta"):  # the shape of the model alone
        skeleton = getattr(transformers, architecture)._from_config(config, dtype=chosen)
    weights = read_weights(checkpoint, chosen)
    if adapter is None and adapters.are_of_adapters(weights):
        raise CheckpointError(
            f"{checkpoint}: holds the weights of a PEFT model; {adapters.NO_CONFIG}: copy there the one that "
            "model.save_pretrained(directory) writes"
        )
    tied = adapters.tied_names(skeleton)
    whole = skeleton if adapter is None else adapters.wrapped(skeleton, adapter, weights)
    try:
        whole.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{checkpoint}: its weights are not those of the model in {source}: {error}") from None
    if adapter is not None and not merged:
        with appearing(out) as unfinished:
            whole.save_pretrained(unfinished)
            copy_tokenizer(source, unfinished)
        return
    if parted := adapters.tied_and_adapted(skeleton, tied):
        raise CheckpointError(
            f"{checkpoint}: its adapter changes one of {' and '.join(parted)}, which are one tied weight, and merging would change both; "
            "export without --merged, then merge in files, which parts them: lisa-ds merge"
        )
    skeleton.tie_weights()
    if adapter is not None:
        skeleton = whole.merge_and_unload()
    inputs = names.stored_in(_files_of(source))
    if inputs:
        names.undo_what_was_done(skeleton, inputs)
    with appearing(out) as unfinished:
        skeleton.save_pretrained(unfinished)
        names.restore(unfinished, inputs, skeleton)
        copy_generation_config(source, unfinished)
        copy_tokenizer(source, unfinished)


def _beside_weights(checkpoint: Path) -> Path:
    for place in (checkpoint, checkpoint.parent):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"{checkpoint}: holds no config.json; say which model was trained, --model NAME_OR_DIRECTORY, whose config and "
        "tokenizer are then used"
    )


def _files_of(source: str) -> Path:
    """The local directory of a model; for a name on the hub, its snapshot in the cache."""
    return Path(transformers.utils.cached_file(source, "config.json")).parent
