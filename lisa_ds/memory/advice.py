"""Advice for a run that does not fit: changes to its settings, the cheapest first, and the fewest ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lisa_ds.errors import LisaError
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.forecast import forecast
from lisa_ds.memory.methods import METHODS, Candidate
from lisa_ds.memory.run_settings import RunSettings

RESERVE = 0.06
"""Share of a device's memory reserved for its context, the communication library and the allocator's fragmentation.
An assumption, not a measurement."""

MOST_RANKS = 4096
_WORTHWHILE = 0.01


@dataclass(frozen=True)
class Change:
    """One change, on top of those before it."""

    write: str
    """The change as ``key=value``, for the command line of ``launch/train.py`` and ``lisa-ds plan``."""

    costs: str
    """What the change costs, in words."""

    peak: int
    """Peak bytes on a rank with the change."""


def usable(memory: int) -> int:
    """Bytes of a device that a run may fill."""
    return int(memory * (1 - RESERVE))


def changes(architecture: Architecture, run: RunSettings, memory: int) -> list[Change]:
    """The changes that make a run fit into ``memory`` bytes a rank, the cheapest first; without those that save little.

    The last one's peak tells whether they are enough.
    """
    found: list[Change] = []
    peak = forecast(architecture, run).peak
    for write, costs, change in _candidates(run):
        if peak <= usable(memory):
            break
        try:
            changed = change(run)
            after = forecast(architecture, changed).peak
        except LisaError:
            continue
        if after < peak * (1 - _WORTHWHILE):
            run, peak = changed, after
            found.append(Change(write, costs, peak))
    return found


def fewest_ranks(architecture: Architecture, run: RunSettings, memory: int) -> int | None:
    """The least power of two of data-parallel ranks with which a run fits, as it is; None if there is none up to 4096."""
    ranks = 1
    divided = METHODS[run.method].shards and not run.offload_param
    weights = run.width * architecture.num_parameters if divided else 0
    while weights // (ranks * run.tensor_parallel) > memory:  # not worth following a step for
        ranks *= 2
    while ranks <= MOST_RANKS:
        if forecast(architecture, replace(run, world_size=ranks)).peak <= usable(memory):
            return ranks * run.tensor_parallel
        ranks *= 2
    return None


def _candidates(run: RunSettings) -> Iterator[Candidate]:
    method = METHODS[run.method]

    def gather(run: RunSettings) -> RunSettings:
        return replace(run, gather=replace(run.gather, max_reuse_distance=0, prefetch_bucket_size=10_000_000))

    zero = "deepspeed.zero_optimization"
    stage = f"{zero}.stage=3"  # a run that has no deepspeed section does not say it yet
    if not method.chooses_bucket and run.bucket_size is not None:
        # Nor this: a section without it would get DeepSpeed's default.
        stage += f" {zero}.reduce_bucket_size={run.bucket_size}"
    yield (
        f"{stage} {zero}.stage3_max_reuse_distance=0 {zero}.stage3_prefetch_bucket_size=10000000",
        "weights are gathered again in backward",
        gather,
    )
    if run.micro_batch > 1:
        accumulation = run.micro_batch * run.accumulation
        wider = replace(run, accumulation=accumulation).gradient_width > run.gradient_width
        yield (
            f"training.per_device_train_batch_size=1 training.gradient_accumulation_steps={accumulation}",
            "more, smaller steps for the same batch" + ("; gradients accumulate in fp32" if wider else ""),
            lambda run: replace(run, micro_batch=1, accumulation=run.micro_batch * run.accumulation),
        )
    yield (
        "training.gradient_checkpointing=true",
        "blocks run twice: about a third more computing",
        lambda run: replace(run, checkpointing=True),
    )
    yield from method.changes(run)
    yield (
        f"{stage} {zero}.offload_optimizer.device=cpu",
        "the update is computed by the host",
        lambda run: replace(run, offload_optimizer=method.offloads(run)),
    )
    yield (
        f"{stage} {zero}.offload_param.device=cpu",
        "weights come from the host at every use",
        lambda run: replace(run, offload_param=method.offloads(run)),
    )
    yield (
        f"data.max_length={run.sequence // 2}",
        "shorter rows",
        lambda run: replace(run, sequence=run.sequence // 2),
    )
