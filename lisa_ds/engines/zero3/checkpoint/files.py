"""Checks a DeepSpeed checkpoint before a LISA run resumes from it: files whole, same model, world size and policies."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lisa_ds.engines.common.progress import Progress
from lisa_ds.errors import CheckpointError

KEY = "lisa"
"""Of the run's progress in the client state."""

ADAPTERS = "lisa_adapters"
"""Of how adapters are added to the weights; absent without any."""


def latest_tag(load_dir: Path) -> str:
    """The tag in ``load_dir/latest``.

    Raises:
        CheckpointError: There is no such file.
    """
    path = load_dir / "latest"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the directory that save_checkpoint wrote, or a tag")
    return path.read_text().strip()


def peek(
    files: Sequence[Path],
    refusal: Callable[[Progress], str | None],
    *,
    world_size: int,
    tensor_size: int = 1,
) -> Progress:
    """Check this rank's checkpoint files and read the progress of the saved run.

    All ranks agree on the outcome: if one finds a bad file, every rank raises.

    Args:
        files: The model-state file (which holds the progress) and the optimizer-state file of this rank.
        refusal: Returns why the run cannot resume from a progress; None if it can.
        world_size: Ranks of the run to be resumed.
        tensor_size: How many of them share each layer.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    progress, problem = _read(files, world_size, tensor_size)
    if progress is not None and (reason := refusal(progress)) is not None:
        problem = f"{files[0]}: {reason}"
    problems: list[str | None] = [None] * world_size
    dist.all_gather_object(problems, problem)
    found = sorted({p for p in problems if p is not None})
    if found or progress is None:
        raise CheckpointError("\n".join(found))
    return progress


def ranks_that_share_layers(tag: Path) -> int:
    """The tensor-parallel size of the run that saved ``tag``: ranks that shared each layer."""
    return max(1, len({path.name.partition("mp_rank_")[2] for path in tag.glob("*mp_rank_*_optim_states.pt")}))


def _read(files: Sequence[Path], world_size: int, tensor_size: int) -> tuple[Progress | None, str | None]:
    tag = files[0].parent
    if not tag.is_dir():
        return None, f"{tag}: no such checkpoint directory"
    ranks = len(list(tag.glob("*zero_pp_rank_*_optim_states.pt")))
    if ranks and (sharing := ranks_that_share_layers(tag)) != tensor_size:
        return None, (
            f"{tag}: was saved with each layer on {sharing} ranks and cannot be resumed with it on {tensor_size}; set "
            f"tensor_parallel.autotp_size (or the mpu's size) to {sharing}"
        )
    if ranks not in (0, world_size):
        return None, (
            f"{tag}: was saved on {ranks} ranks and cannot be resumed on {world_size}; run on {ranks} ranks, or export "
            "it with `lisa-ds export`, or load it without optimizer states, and start from its weights"
        )
    for file in files:
        if not file.is_file():
            return None, f"{file}: no such file; the checkpoint is incomplete"
        if not zipfile.is_zipfile(file):  # torch.save writes a zip, whose directory is at its end
            return None, f"{file}: is truncated or not a checkpoint ({file.stat().st_size} bytes); use an earlier tag"
    # weights_only=False: DeepSpeed's own files hold its loss scaler and shapes as objects, and it loads them so too.
    try:
        saved = torch.load(files[0], map_location="cpu", weights_only=False, mmap=True).get(KEY)
    except (RuntimeError, OSError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        # Told, not raised: the other ranks wait to hear what this one found.
        return None, f"{files[0]}: cannot be read: {' '.join(str(error).split())}"
    if saved is None:
        return None, f"{files[0]}: was not written by lisa_ds; export its weights and start from those"
    return Progress.of(saved), None
