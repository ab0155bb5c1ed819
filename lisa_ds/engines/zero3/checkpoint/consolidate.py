"""Reads a DeepSpeed checkpoint back into whole tensors, without an engine and without ranks."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from lisa_ds.engines.common import adapters
from lisa_ds.engines.zero3.checkpoint.files import ADAPTERS, latest_tag, ranks_that_share_layers
from lisa_ds.errors import CheckpointError


def read_weights(directory: Path, dtype: torch.dtype, *, merges: bool = True) -> dict[str, Tensor]:
    """Every parameter of the model that was saved, whole and in one dtype.

    DeepSpeed's files are pickles: read only checkpoints you trust.

    Args:
        directory: The directory given to ``save_checkpoint``, which holds a ``latest`` file; or one tag's directory in
            it.
        dtype: What parameters are cast to. Those that were training are stored in fp32, the others as the model holds them.
        merges: Whether the adapters of ``lisa.adapters`` are added to the weights; else they are apart, as in the model that trained.

    Raises:
        CheckpointError: A file is missing, truncated or not DeepSpeed's, or several ranks shared each layer. Names it.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory (looked from {Path.cwd()})")
    is_tag = not (directory / "latest").is_file() and any(directory.glob("*_optim_states.pt"))
    tag = directory.name if is_tag else latest_tag(directory)
    root = directory.parent if is_tag else directory
    _check_files(root / tag)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it is talkative
            weights = get_fp32_state_dict_from_zero_checkpoint(str(root), tag)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        NotImplementedError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(f"{root / tag}: cannot be read: {' '.join(str(error).split())}") from error
    if merges and (rule := _rule(root / tag)) is not None:
        weights = adapters.merged(weights, rule)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}


def _rule(tag: Path) -> adapters.Rule | None:
    first = min(tag.glob("*_model_states.pt"))
    found = torch.load(first, map_location="cpu", weights_only=False, mmap=True).get(ADAPTERS)
    return None if found is None else adapters.Rule(**found)


def _check_files(tag: Path) -> None:
    if not tag.is_dir():
        raise CheckpointError(f"{tag}: no such checkpoint directory")
    state = sorted(tag.glob("*_optim_states.pt"))
    if not state:
        raise CheckpointError(f"{tag}: holds no *_optim_states.pt, so it is not a checkpoint of DeepSpeed ZeRO")
    if (sharing := ranks_that_share_layers(tag)) > 1:
        raise CheckpointError(
            f"{tag}: holds layers in parts of {sharing} ranks, which the ranks themselves put together: resume it as it was "
            "saved (launch/train.py --resume auto writes output_dir/model), or call engine.save_16bit_model(directory)"
        )
    models = sorted(tag.glob("*_model_states.pt"))
    # Frozen parameters lie in the model files, a part of each in every rank's.
    if len(models) != len(state):
        raise CheckpointError(
            f"{tag}: has {len(models)} *_model_states.pt and {len(state)} *_optim_states.pt; a run writes one of both on "
            "each rank, so files are missing"
        )
    for file in (*models, *state):
        if not zipfile.is_zipfile(file):  # torch.save writes a zip, whose directory is at its end
            raise CheckpointError(f"{file}: is truncated or not a checkpoint ({file.stat().st_size} bytes)")
