"""What a DeepSpeed checkpoint must say for a LISA run to resume, and the checks before anything is read from it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lisa_ds.errors import CheckpointError

KEY = "lisa"


@dataclass(frozen=True)
class Progress:
    """Where a run stands. The draws to come follow from the step and the config alone."""

    step: int
    """Applied optimizer steps."""

    sampled: tuple[int, ...]
    """Blocks that were training."""

    roles: tuple[str, ...] | None
    """Roles that were; None of a checkpoint that does not tell, from when they were the same in all intervals."""

    history: tuple[tuple[int, ...], ...]
    """Every set of blocks so far."""

    num_layers: int
    policies: dict[str, str]
    """When embeddings, head and rest train (what never does has no state in the file), and what state is kept in."""

    next_draw: int
    """Hash of the next interval's draw, to tell a changed schedule."""

    frozen: tuple[str, ...] | None = None
    """Parameters frozen before the engine was built; None in files of before this was told."""

    draws: dict[str, Any] | None = None
    """What this rank had seen, where draws depend on that; None in files of before there were such draws."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, so that a checkpoint can be read without this package."""
        return asdict(self)


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
    num_layers: int,
    policies: dict[str, str],
    *,
    frozen: Collection[str],
    world_size: int,
    tensor_size: int = 1,
) -> Progress:
    """Check this rank's checkpoint files and read where the saved run stood.

    All ranks agree on the outcome: if one finds a bad file, every rank raises.

    Args:
        files: The model-state file (which holds the progress) and the optimizer-state file of this rank.
        num_layers: Blocks of the model to be resumed.
        policies: The run's policies.
        frozen: Its parameters that were frozen beforehand.
        world_size: Ranks of the run to be resumed.
        tensor_size: How many of them share each layer.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    progress, problem = _read(files, num_layers, policies, world_size, tensor_size)
    if progress is not None and (changed := _other_frozen(progress.frozen, frozen)):
        problem = f"{files[0]}: {changed}; freeze the same ones before initialize, or start from its weights alone"
    problems: list[str | None] = [None] * world_size
    dist.all_gather_object(problems, problem)
    found = sorted({p for p in problems if p is not None})
    if found or progress is None:
        raise CheckpointError("\n".join(found))
    return progress


def _other_frozen(saved: Collection[str] | None, here: Collection[str]) -> str | None:
    """In which parameters the frozen ones differ, if they do."""
    if saved is None or set(saved) == set(here):
        return None
    parts = []
    for names, what in (
        (sorted(set(saved).difference(here)), "were frozen when it was saved, and train here"),
        (sorted(set(here).difference(saved)), "are frozen here, and trained when it was saved"),
    ):
        if names:
            parts.append(f"{len(names)} parameters {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})")
    return "; ".join(parts)


def ranks_that_share_layers(tag: Path) -> int:
    """On how many ranks each layer lay when ``tag`` was saved: 1 without tensor parallelism."""
    return max(1, len({path.name.partition("mp_rank_")[2] for path in tag.glob("*mp_rank_*_optim_states.pt")}))


def _read(
    files: Sequence[Path], num_layers: int, policies: dict[str, str], world_size: int, tensor_size: int
) -> tuple[Progress | None, str | None]:
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
    progress = Progress(
        step=saved["step"],
        sampled=tuple(saved["sampled"]),
        roles=tuple(saved["roles"]) if "roles" in saved else None,
        history=tuple(tuple(layers) for layers in saved["history"]),
        num_layers=saved["num_layers"],
        policies={"optimizer.precision": "mixed", "optimizer.moments": "fp32", **saved["policies"]},  # of before these
        next_draw=saved["next_draw"],
        frozen=None if saved.get("frozen") is None else tuple(saved["frozen"]),
        draws=saved.get("draws"),
    )
    if progress.num_layers != num_layers:
        return None, f"{files[0]}: is of a model with {progress.num_layers} layers; this one has {num_layers}"
    if progress.policies != policies:
        changed = ", ".join(
            f"{role} {was!r} (now {policies.get(role)!r})"
            for role, was in progress.policies.items()
            if was != policies.get(role)
        )
        return (
            None,
            f"{files[0]}: was saved with lisa.{changed}; resume with the saved policies, or start from its weights alone",
        )
    return progress, None
