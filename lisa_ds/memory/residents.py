"""What stays on a rank through a step, by method: weights, gradients, master copy and moments."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import ROLES
from lisa_ds.memory import other_methods
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.state import ModelShape, Precision, full_state_bytes, plan, state_bytes

if TYPE_CHECKING:
    from lisa_ds.memory.run_settings import RunSettings


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

    switched: int
    """Elements on this rank of the largest unit that a switch may bring in: of all blocks, and the roles that do not always train."""

    trainable: int
    """Elements on this rank of all that could ever train."""

    sub_group: int
    """Elements on this rank of the largest sub-group that the optimizer steps at a time."""

    largest_parameter: int
    """Elements of the largest parameter, whole."""

    largest_trainable: int
    """Elements of the largest that could ever train, whole."""


def of(
    architecture: Architecture,
    run: RunSettings,
    sampled: Collection[int] | None,
    roles: Collection[str] | None = None,
) -> Residents:
    """The residents of a run.

    Args:
        architecture: The model, as this rank's share under tensor parallelism.
        run: Its settings; any method but GaLore.
        sampled: LISA's blocks; None for the draw that takes the most.
        roles: LISA's roles; None for all that may train.
    """
    shape = architecture.shape
    blocks, trains, always = list(range(len(shape.layers))), list(ROLES), 0
    comes: list[str] = []
    trained: Iterable[int] = shape.all()
    if run.method == "lora":
        state, trained, blocks, trains = *other_methods.lora_state(architecture, run), [], []
    elif run.method == "full":
        precision = Precision(run.width, run.gradient_width)
        state = _by_part(full_state_bytes(shape, world_size=run.world_size, precision=precision))
    else:
        may, steady = (shape.roles(run.lisa, always=only) for only in (False, True))
        comes = [role for role in may if role not in steady]
        trains = may if roles is None else list(roles)
        state, always, blocks = _lisa(shape, run, sampled, trains, steady)
        units = [*shape.layers, *(getattr(shape, role) for role in may)]
        trained = [numel for unit in units for numel in unit]
    trained = list(trained)
    trainable = _partitions(trained, run.world_size)
    block = max(_partitions(layer, run.world_size) for layer in shape.layers)
    if run.method == "lisa":
        sub_group = max([block, *(_partitions(getattr(shape, role), run.world_size) for role in trains)])
    else:
        sub_group = min(trainable, run.sub_group_size)
    return Residents(
        state=state,
        always_moments=always,
        blocks=blocks,
        roles=trains,
        switched=max([block, *(_partitions(getattr(shape, role), run.world_size) for role in comes)]),
        trainable=trainable,
        sub_group=sub_group,
        largest_parameter=max(shape.all()),
        largest_trainable=max(trained),
    )


def _lisa(
    shape: ModelShape, run: RunSettings, sampled: Collection[int] | None, roles: list[str], always: list[str]
) -> tuple[dict[str, int], int, list[int]]:
    precision = Precision.of_lisa(run.lisa, run.width, run.gradient_width)
    blocks = _worst(shape, run.lisa) if sampled is None else list(sampled)
    if sampled is None and roles == shape.roles(run.lisa, always=False):
        table = plan(shape, run.lisa, world_size=run.world_size, precision=precision).most
    else:
        table = state_bytes(shape, sampled=blocks, roles=roles, world_size=run.world_size, precision=precision)
    none = state_bytes(
        replace(shape, layers=()), sampled=[], roles=always, world_size=run.world_size, precision=precision
    )
    return _by_part(table), none["exp_avg"] + none["exp_avg_sq"], blocks


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
