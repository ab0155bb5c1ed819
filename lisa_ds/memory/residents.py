"""Model state that stays on a rank through a step: weights, gradients, master copy, moments; and sizes of buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lisa_ds.memory.run_settings import RunSettings
from lisa_ds.memory.state import ModelShape, partitions
from lisa_ds.memory.step import Sampled


@dataclass(frozen=True)
class Residents:
    """Model state on one rank, and the sizes that decide how large temporary buffers are."""

    state: dict[str, int]
    """Bytes of ``weights, gradients, master, moments``."""

    always_moments: int
    """Bytes of the moments of what trains in every interval."""

    blocks: Sampled
    """Blocks that train, or by block those of its modules that do."""

    roles: list[str]
    """The roles (embeddings, head, rest) that train."""

    switched: int
    """Elements on this rank of the largest unit that a switch may bring in: of all blocks, and the roles that do not always train."""

    trainable: int
    """Elements on this rank of all parameters that ever train."""

    sub_group: int
    """Elements on this rank of the largest sub-group that the optimizer steps at a time."""

    largest_parameter: int
    """Elements of the largest parameter, whole."""

    largest_trainable: int
    """Elements of the largest parameter that ever trains, whole."""


def residents(
    shape: ModelShape,
    run: RunSettings,
    state: dict[str, int],
    *,
    trained: Sequence[int],
    blocks: Sampled,
    roles: Iterable[str],
    comes: Iterable[str] = (),
    always_moments: int = 0,
) -> Residents:
    """The residents of a run, where the optimizer steps sub-groups of the config's size.

    Args:
        shape: The model, as this rank's share under tensor parallelism.
        run: Its settings.
        state: Bytes by part.
        trained: Elements of each parameter that ever trains.
        blocks: Blocks that train, or by block those of its modules that do.
        roles: Roles that train.
        comes: Roles that may start to train at a switch.
        always_moments: Bytes of the moments of what trains in every interval.
    """
    units = [*shape.layers, *(getattr(shape, role) for role in comes)]
    trainable = sum(partitions(trained, run.world_size))
    return Residents(
        state=state,
        always_moments=always_moments,
        blocks=blocks,
        roles=list(roles),
        switched=max(sum(partitions(unit, run.world_size)) for unit in units),
        trainable=trainable,
        sub_group=min(trainable, run.sub_group_size),
        largest_parameter=max(shape.all()),
        largest_trainable=max(trained, default=0),  # adapters of a plan beside the run's may have no place
    )


def by_part(table: Mapping[str, int]) -> dict[str, int]:
    """From bytes by kind to bytes by part, for what stays on the device: both moments are one part."""
    parts = {part: table[part] for part in ("weights", "gradients", "master")}
    return {**parts, "moments": table["exp_avg"] + table["exp_avg_sq"]}
