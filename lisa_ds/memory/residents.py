"""What stays on a rank through a step, by method: weights, gradients, master copy and moments."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lisa_ds.config import LisaConfig
from lisa_ds.memory import other_methods
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.state import ROLES, ModelShape, Precision, full_state_bytes, plan, state_bytes

if TYPE_CHECKING:
    from lisa_ds.memory.forecast import RunSettings


@dataclass(frozen=True)
class Residents:
    """State on one rank, and the sizes that decide what comes and goes beside it."""

    state: dict[str, int]
    """Bytes of ``weights, gradients, master, moments``."""

    always_moments: int
    """Bytes of the moments of what trains whatever is drawn."""

    blocks: list[int]
    """Blocks that train."""

    roles: list[str]
    """Of embeddings, head and rest, those that train."""

    trainable: int
    """Elements on this rank of all that could ever train."""

    sub_group: int
    """Elements on this rank of the largest sub-group that the optimizer steps at a time."""

    block: int
    """Elements on this rank of the largest block."""

    largest_parameter: int
    """Elements of the largest parameter, whole."""

    largest_trainable: int
    """Elements of the largest that could ever train, whole."""


def of(architecture: Architecture, run: RunSettings, sampled: Collection[int] | None) -> Residents:
    """The residents of a run.

    Args:
        architecture: The model, as this rank's share under tensor parallelism.
        run: Its settings; any method but GaLore.
        sampled: LISA's blocks; None for the draw that takes the most.
    """
    shape = architecture.shape
    blocks, roles, always = list(range(len(shape.layers))), list(ROLES), 0
    trained: Iterable[int] = shape.all()
    if run.method == "lora":
        state, trained, blocks, roles = *other_methods.lora_state(architecture, run), [], []
    elif run.method == "full":
        precision = Precision(run.width, run.gradient_width)
        state = _by_part(full_state_bytes(shape, world_size=run.world_size, precision=precision))
    else:
        state, always, blocks, roles = _lisa(shape, run, sampled)
        units = [*shape.layers, *(getattr(shape, role) for role in roles)]
        trained = [numel for unit in units for numel in unit]
    trained = list(trained)
    trainable = _partitions(trained, run.world_size)
    block = max(_partitions(layer, run.world_size) for layer in shape.layers)
    if run.method == "lisa":
        sub_group = max([block, *(_partitions(getattr(shape, role), run.world_size) for role in roles)])
    else:
        sub_group = min(trainable, run.sub_group_size)
    return Residents(
        state, always, blocks, roles, trainable, sub_group, block, max(shape.all()), max(trained)
    )  # fmt: skip


def _lisa(
    shape: ModelShape, run: RunSettings, sampled: Collection[int] | None
) -> tuple[dict[str, int], int, list[int], list[str]]:
    lisa, world_size = run.lisa, run.world_size
    precision = Precision.of_lisa(lisa, run.width, run.gradient_width)
    if sampled is None:
        blocks = _worst(shape, lisa)
        table = plan(shape, lisa, world_size=world_size, precision=precision).most
    else:
        blocks = list(sampled)
        table = state_bytes(shape, sampled=blocks, world_size=world_size, config=lisa, precision=precision)
    none = state_bytes(replace(shape, layers=()), sampled=[], world_size=world_size, config=lisa, precision=precision)
    roles = [role for role in ROLES if getattr(lisa, role) == "always"]
    return _by_part(table), none["exp_avg"] + none["exp_avg_sq"], blocks, roles


def _worst(shape: ModelShape, lisa: LisaConfig) -> list[int]:
    """The blocks of a draw that takes the most: the lowest ones, from which backward has the longest way."""
    if lisa.sampler.layers:
        return list(lisa.sampler.layers)
    count = len(shape.layers) if lisa.sampler.varies else lisa.most_sampled(len(shape.layers))
    return list(range(count))


def _by_part(table: Mapping[str, int]) -> dict[str, int]:
    parts = {part: table[part] for part in ("weights", "gradients", "master")}
    return {**parts, "moments": table["exp_avg"] + table["exp_avg_sq"]}


def _partitions(numels: Iterable[int], world_size: int) -> int:
    return sum(-(-numel // world_size) for numel in numels)
