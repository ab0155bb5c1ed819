"""Bytes of model state on one rank, from the model's shape alone: exact, and without torch.

ZeRO-3 splits every parameter into ``world_size`` partitions of ``ceil(numel / world_size)`` elements, and LISA keeps
gradients, master copy and moments for the sampled ones only. The numbers are those that ``engine.memory_report()``
counts on the live tensors once each sampled layer has taken a step. Activations are not model state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from lisa_ds.config import LisaConfig
from lisa_ds.config.formats import QUANT_BLOCK
from lisa_ds.config.roles import ROLES, share_of

KINDS = ("weights", "gradients", "master", "exp_avg", "exp_avg_sq", "parked_host", "parked_nvme", "buckets")
"""The keys of every table of bytes, here and in ``engine.memory_report()``."""

SAMPLED_KINDS = ("gradients", "master", "exp_avg", "exp_avg_sq")
"""Those that LISA keeps for what is sampled only."""

PARTS_OF_STATE: Mapping[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "master": ("master",),
    "moments": ("exp_avg", "exp_avg_sq"),
    "buckets": ("buckets",),
}
"""Parts of a plan, each with the kinds of live state that it holds."""

_FP32 = 4  # gradients on the host, whatever the weights are
_SMALLEST_BUCKET, _LARGEST_BUCKET = 2**24, 5 * 10**8


@dataclass(frozen=True)
class ModelShape:
    """The number of elements of each parameter of a model, by unit."""

    layers: tuple[tuple[int, ...], ...]  # what is drawn: blocks, or matrices
    embeddings: tuple[int, ...] = ()
    lm_head: tuple[int, ...] = ()  # empty if it is tied: the weight is counted once, with the embeddings
    rest: tuple[int, ...] = ()
    block_rest: tuple[int, ...] = ()  # where layers are matrices
    adapters: tuple[int, ...] = ()
    tied: bool = False
    frozen: tuple[int, ...] = ()  # parameters that never train whatever the policies say; in no other field
    of_blocks: int | None = None  # blocks that hold ``layers``, where these are matrices

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.layers) if self.of_blocks is None else self.of_blocks

    @classmethod
    def from_numels(
        cls,
        numels: Mapping[int | str, Sequence[int]],
        *,
        tied: bool = False,
        frozen: Sequence[int] = (),
        of_blocks: int | None = None,
    ) -> ModelShape:
        """The shape from :meth:`lisa_ds.LayerStack.numels`.

        Args:
            numels: By unit.
            tied: Whether the head is.
            frozen: Parameters that were left out.
            of_blocks: Blocks of the model, where matrices are drawn.
        """
        layers = sorted(unit for unit in numels if isinstance(unit, int))
        roles = {role: tuple(numels.get(role, ())) for role in ROLES}
        units = tuple(tuple(numels[layer]) for layer in layers)
        return cls(layers=units, tied=tied, frozen=tuple(frozen), of_blocks=of_blocks, **roles)

    def trained(self, sampled: Iterable[int], roles: Collection[str]) -> list[int]:
        """Elements of each parameter that trains while the layers ``sampled`` and ``roles`` do."""
        units = [self.layers[layer] for layer in sampled]
        units += [getattr(self, role) for role in ROLES if role in roles]
        return [numel for unit in units for numel in unit]

    def roles(self, config: LisaConfig, *, always: bool) -> list[str]:
        """Roles that train in every interval (``always``), or in at least one."""
        shares = {role: share_of(config, role, tied=self.tied, num_layers=self.num_blocks) for role in ROLES}
        there = (role for role in ROLES if role not in ("block_rest", "adapters") or getattr(self, role))
        return [role for role in there if shares[role] == 1 or (shares[role] and not always)]

    def all(self) -> list[int]:
        """Elements of every parameter."""
        units = (*self.layers, *(getattr(self, role) for role in ROLES), self.frozen)
        return [numel for unit in units for numel in unit]


@dataclass(frozen=True)
class Precision:
    """Bytes per element of each kind of state, and of the engine's buffers."""

    weight_bytes: int = 2
    """2 for bf16 and fp16 weights, 4 for fp32."""

    gradient_bytes: int = 2
    """2 or 4, by DeepSpeed's ``data_types.grad_accum_dtype``; lisa_ds takes fp32 when it accumulates."""

    bucket_bytes: int = 0
    """The reduce bucket: ``reduce_bucket_size`` times the bytes of the type that is communicated."""

    master_bytes: int = 4
    """0 under stochastic rounding."""

    moments: str = "fp32"
    """``fp32``, ``bf16``, ``int8`` or ``none``, as ``lisa.optimizer.moments``."""

    offload_optimizer: bool = False
    """Whether state is kept on the host, where every sampled partition has an fp32 gradient as well."""

    @classmethod
    def of_lisa(cls, config: LisaConfig, weight_bytes: int, gradient_bytes: int) -> Precision:
        """The precision of ``lisa.optimizer``, with weights and gradients of this many bytes per element."""
        master = 4 if config.optimizer.precision == "mixed" else 0
        return cls(weight_bytes, gradient_bytes, master_bytes=master, moments=config.optimizer.moments)


@dataclass(frozen=True)
class Plan:
    """Bytes of model state on one rank before a run is started, each a table by :data:`KINDS`."""

    typical: dict[str, int]
    """The mean over draws, and over intervals with and without embeddings and head if they do not train in all."""

    most: dict[str, int]
    """With the largest layers drawn (``bernoulli``: all of them; of matrices, as many elements as a draw may have), and with all
    roles that may train."""

    full: dict[str, int]
    """The same model with every parameter trained all the time."""


def state_bytes(
    shape: ModelShape,
    *,
    sampled: Collection[int],
    world_size: int,
    roles: Collection[str] | None = None,
    config: LisaConfig | None = None,
    precision: Precision | None = None,
) -> dict[str, int]:
    """Bytes on one rank while the layers ``sampled`` and ``roles`` train.

    Args:
        shape: The model.
        sampled: Indices of the layers that are drawn.
        world_size: Ranks that share the state.
        roles: Which of embeddings, head and rest train; None for those that do in every interval.
        config: Their policies, asked for ``roles`` alone; by default all of them always train.
        precision: Bytes of an element; by default a 16-bit model that does not accumulate gradients.

    Example:
        >>> shape = ModelShape(layers=((10, 7), (10, 7)), embeddings=(9,))
        >>> state_bytes(shape, sampled=[1], world_size=2)["exp_avg"]  # ceil(10/2) + ceil(7/2) + ceil(9/2) elements
        56
    """
    if roles is None:
        roles = shape.roles(config or LisaConfig(), always=True)
    trained = partitions(shape.trained(sampled, roles), world_size)
    return _table(trained, sum(partitions(shape.all(), world_size)), precision or Precision())


def full_state_bytes(shape: ModelShape, *, world_size: int, precision: Precision | None = None) -> dict[str, int]:
    """Bytes on one rank when every parameter trains all the time, as in full fine-tuning under ZeRO-3."""
    return state_bytes(shape, sampled=range(len(shape.layers)), world_size=world_size, precision=precision)


def default_bucket(shape: ModelShape) -> int:
    """Elements of the reduce bucket where the config names none: the largest block, at least 2^24, at most the model or 5e8.

    Those 5e8 are DeepSpeed's default. It would outweigh the whole sampled state; a block of a 70B model is larger still.
    """
    trainable = (*shape.layers, *(getattr(shape, role) for role in ROLES))
    return min(max(*map(sum, shape.layers), _SMALLEST_BUCKET), sum(map(sum, trainable)), _LARGEST_BUCKET)


def plan(
    shape: ModelShape, config: LisaConfig | None = None, *, world_size: int, precision: Precision | None = None
) -> Plan:
    """Bytes on one rank over a whole run, from its config alone.

    Raises:
        ConfigError: The config samples more layers than the model has, or none.
    """
    config, precision = config or LisaConfig(), precision or Precision()
    count, greatest = config.num_sampled(shape.num_blocks), config.most_sampled(shape.num_blocks)
    weights = sum(partitions(shape.all(), world_size))
    always = _table(partitions(shape.trained([], shape.roles(config, always=True)), world_size), weights, precision)

    def table_of(elements: Sequence[int]) -> dict[str, int]:
        return _table(elements, 0, replace(precision, bucket_bytes=0))

    def table(numels: Iterable[int]) -> dict[str, int]:
        return table_of(partitions(numels, world_size))

    layers = [table(layer) for layer in shape.layers]
    typical, most = dict(always), dict(always)
    for role in shape.roles(config, always=False):
        share = share_of(config, role, tied=shape.tied, num_layers=shape.num_blocks)
        for kind, size in table(getattr(shape, role)).items() if share < 1 else ():
            typical[kind] += round(share * size)
            most[kind] += size
    by_matrix = shape.of_blocks is not None
    bound = table_of(_most_elements(shape, config, world_size)) if by_matrix else {}
    for kind in always:
        sizes = [layer[kind] for layer in layers]
        if by_matrix:
            drawn, largest = round(sum(sizes) * config.share(shape.num_blocks)), bound[kind]
        elif config.sampler.layers:
            drawn = largest = sum(sizes[layer] for layer in config.sampler.layers)
        else:
            drawn = round(sum(sizes) * count / len(sizes))  # as if each layer were drawn equally often
            largest = sum(sizes if config.sampler.varies else sorted(sizes)[-greatest:])
        typical[kind] += drawn
        most[kind] += largest
    return Plan(typical, most, full_state_bytes(shape, world_size=world_size, precision=precision))


def _most_elements(shape: ModelShape, config: LisaConfig, world_size: int) -> list[int]:
    """Elements on a rank of each parameter of a draw of matrices that has all that one may have: no draw has more.

    A draw is a share of the elements of all blocks, and as many parameters as fit if the smallest are drawn; each part of a
    parameter that does not divide evenly is rounded up.
    """
    budget = most_of_a_draw(shape, config)
    config.check_budget(budget, max(map(sum, shape.layers)), sum(map(sum, shape.layers)))
    count, room = 0, budget
    for unit in sorted(shape.layers, key=sum):
        if sum(unit) <= room:
            room -= sum(unit)
            count += len(unit)
    uneven = any(numel % world_size for unit in shape.layers for numel in unit)
    elements = budget // world_size + (count if uneven else 0)
    # Of all divisions the one with the most 8-bit scales.
    return [*[1] * (count - 1), elements - (count - 1)]


def most_of_a_draw(shape: ModelShape, config: LisaConfig) -> int:
    """Elements that a draw of matrices may have, of all that the run makes.

    Raises:
        ConfigError: See ``LisaConfig.num_sampled``.
    """
    share = config.share(shape.num_blocks)
    if config.sampling_ratio is None:
        share = Fraction(config.most_sampled(shape.num_blocks), shape.num_blocks)
    return int(share * sum(map(sum, shape.layers)))


def partitions(numels: Iterable[int], world_size: int) -> list[int]:
    """Elements on a rank of parameters of ``numels`` elements."""
    return [-(-numel // world_size) for numel in numels]


def _table(trained: Sequence[int], weights: int, precision: Precision) -> dict[str, int]:
    """Bytes of each kind, from the elements of each trained partition and of all weights."""
    elements = sum(trained)
    scales = 4 * sum(-(-partition // QUANT_BLOCK) for partition in trained)
    moment = {"fp32": 4 * elements, "bf16": 2 * elements, "int8": elements + scales, "none": 0}[precision.moments]
    host_gradients = _FP32 * elements if precision.offload_optimizer else 0
    return dict.fromkeys(KINDS, 0) | {
        "weights": precision.weight_bytes * weights,
        "gradients": precision.gradient_bytes * elements + host_gradients,
        "master": precision.master_bytes * elements,
        "exp_avg": moment,
        "exp_avg_sq": moment,
        "buckets": precision.bucket_bytes,
    }
