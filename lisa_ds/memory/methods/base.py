"""The interface by which a method is planned, and the plan of methods that train under ZeRO-3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import ClassVar

from lisa_ds.config.stages import ZERO_STAGES
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.gradients import GradientSettings
from lisa_ds.memory.residents import Residents
from lisa_ds.memory.run_settings import PARTS, Forecast, RunSettings
from lisa_ds.memory.state import ModelShape, partitions
from lisa_ds.memory.step import StepPeaks, StepSettings, step_peaks
from lisa_ds.memory.tape import Adapters

Candidate = tuple[str, str, Callable[[RunSettings], RunSettings]]
"""A change to a run: what to write, what it costs, and the changed run."""

DEEPSPEEDS_BUCKET = 500_000_000


class Method(ABC):
    """A method of fine-tuning, to be planned."""

    name: ClassVar[str]
    """The name in run files."""

    title: ClassVar[str]
    """The name in reports."""

    chooses_bucket: ClassVar[bool] = False
    """Whether its engine chooses the reduce bucket where the config names none; else transformers does, or DeepSpeed."""

    @property
    def shards(self) -> bool:
        """Whether weights and state are partitioned over ranks."""
        return bool(ZERO_STAGES[self.name])

    @abstractmethod
    def forecast(
        self,
        architecture: Architecture,
        run: RunSettings,
        *,
        whole: Architecture,
        sampled: Collection[int] | None,
        roles: Collection[str] | None,
    ) -> Forecast:
        """The peaks of a run.

        Args:
            architecture: The model, as this rank's share under tensor parallelism.
            run: Its settings.
            whole: The model.
            sampled: LISA's blocks, to plan for one draw; None for the one that takes the most.
            roles: Which of embeddings, head and rest train under LISA; None for all that may.

        Raises:
            ConfigError: The method's settings do not fit the model.
        """

    def least(self, shape: ModelShape, run: RunSettings) -> int:
        """A lower bound of a rank's bytes, from the sizes of parameters alone; by default that of the weights."""
        return run.width * (sum(partitions(shape.all(), run.world_size)) if self.shards else sum(shape.all()))

    def summary(self, run: RunSettings, *, tied: bool) -> str:
        """In a few words, what trains."""
        return self.title

    def notes(self, run: RunSettings) -> list[str]:
        """The variant that is planned, where there are several; a line each."""
        return []

    def changes(self, run: RunSettings) -> Iterator[Candidate]:
        """Changes to the method's own settings that save memory, the cheapest first."""
        yield from ()

    def offloads(self, run: RunSettings) -> bool:
        """Whether state and weights may be kept on the host."""
        return True


class UnderZero3(Method):
    """A method that trains under ZeRO-3, in LISA's engine or in DeepSpeed's own."""

    casts_gradients: ClassVar[bool] = True
    """Whether a sub-group's gradient is cast to fp32 before its step, as stock ZeRO-3 does."""

    forgets_inputs: ClassVar[bool] = False
    """Whether frozen linears keep no input for backward."""

    @abstractmethod
    def residents(
        self,
        architecture: Architecture,
        run: RunSettings,
        sampled: Collection[int] | None = None,
        roles: Collection[str] | None = None,
    ) -> Residents:
        """What stays allocated on a rank through a step; arguments as for :meth:`forecast`."""

    def adapters(self, architecture: Architecture, run: RunSettings) -> Mapping[int, Adapters]:
        """Adapters beside linears, by block."""
        return {}

    def stage(self, run: RunSettings) -> int:
        """The ZeRO stage."""
        return 3

    def default_bucket(self, shape: ModelShape) -> int:
        """Elements of the reduce bucket where the config names none."""
        return DEEPSPEEDS_BUCKET

    def peaks(self, architecture: Architecture, run: RunSettings, settings: StepSettings, held: Residents) -> StepPeaks:
        """The peaks of a step beyond what stays; arguments as of :meth:`own_phases`."""
        return step_peaks(architecture, settings, sampled=held.blocks, roles=held.roles)

    def own_phases(
        self,
        architecture: Architecture,
        run: RunSettings,
        settings: StepSettings,
        held: Residents,
        state: Mapping[str, int],
        phases: Mapping[str, dict[str, int]],
    ) -> dict[str, dict[str, int]]:
        """Phases that only this method has.

        Args:
            architecture: The model, as this rank's share.
            run: Its settings.
            settings: The settings of its step.
            held: What stays on a rank, see :meth:`residents`.
            state: What stays on the device, by part.
            phases: The phases that all methods have.
        """
        return {}

    def forecast(
        self,
        architecture: Architecture,
        run: RunSettings,
        *,
        whole: Architecture,
        sampled: Collection[int] | None,
        roles: Collection[str] | None,
    ) -> Forecast:
        """See the base class."""
        held = self.residents(architecture, run, sampled, roles)
        bucket = self.default_bucket(architecture.shape) if run.bucket_size is None else run.bucket_size
        partitioned = self.stage(run) == 3
        passing = {"buckets": bucket * run.width * (1 if partitioned or not run.overlap_comm else 2)}
        gradients = GradientSettings(bucket)
        if not partitioned:
            late = 0 if run.offload_optimizer or run.accumulation > 1 else held.state["gradients"]
            gradients = GradientSettings(bucket, copies=False, bucket_bytes=passing["buckets"], reduced_bytes=late)
        settings = StepSettings(
            tokens=run.tokens,
            world_size=run.world_size if partitioned else 1,  # nothing is gathered of what is not partitioned
            sequence=run.sequence,
            width=run.width,
            checkpointing=run.checkpointing,
            gradients=gradients,
            forgets_inputs=self.forgets_inputs or not partitioned,  # plain torch keeps what it needs
            adapters=self.adapters(architecture, run),
            fused_loss=run.fused_loss,
            gather=run.gather,
        )
        peaks = self.peaks(architecture, run, settings, held)
        state = {**held.state, **(passing if partitioned else {})}
        host: dict[str, int] = {}
        if run.offload_optimizer:
            host = {part: state.pop(part) for part in ("gradients", "master", "moments")}
            # The update is computed there, from an fp32 gradient; under ZeRO-3 beside the one that was reduced.
            host["gradients"] = host["master"] + (host["gradients"] if self.stage(run) == 3 else 0)
        if run.second_copies > 1:
            state["weights"] += run.width * -(-sum(architecture.shape.all()) // run.second_copies)
        if run.offload_param:
            host["weights"] = state.pop("weights")
        small = {"gathered": peaks.persistent}
        casts = self.casts_gradients and not run.offload_optimizer
        before = state if not gradients.reduced_bytes else {**state, "gradients": 0}
        phases = {
            "init": _init(before, held, run),
            "forward": added(before, peaks.forward),
            "backward": added(before, peaks.backward),
            "step": added(state, small, {"scratch": (4 + run.width) * held.sub_group if casts else 0}),
        }
        phases |= self.own_phases(architecture, run, settings, held, state, phases)
        gathered = held.largest_parameter * run.width if settings.world_size > 1 else 0
        phases["export"] = added(state, small, {"gathered": gathered})
        host["export on rank 0"] = run.width * whole.num_parameters
        return Forecast({name: tidy(parts) for name, parts in phases.items()}, {k: v for k, v in host.items() if v})


def _init(state: Mapping[str, int], held: Residents, run: RunSettings) -> dict[str, int]:
    """The peak of Stage 3's setup: flat weights, then fp32 copies and a zero gradient for a first step, then hooks."""
    weights = {"weights": state.get("weights", 0)}
    masters = {**weights, "master": state.get("master", 0)}
    everything = {part: size for part, size in state.items() if part != "moments"}
    moments = [
        {**weights, "scratch": run.width * held.trainable if run.on_cpu else 0},
        {**masters, "scratch": 0 if run.offload_optimizer else 4 * held.sub_group},
        # To hook into its gradient, each trainable parameter is gathered for a moment.
        {**everything, "gathered": run.width * held.largest_trainable},
    ]
    return max(moments, key=total)


def added(*tables: Mapping[str, int]) -> dict[str, int]:
    """The sum of tables of bytes by part."""
    return {part: sum(table.get(part, 0) for table in tables) for part in PARTS}


def total(parts: Mapping[str, int]) -> int:
    """The sum over all parts."""
    return sum(parts.values())


def tidy(parts: Mapping[str, int]) -> dict[str, int]:
    """The parts that are not 0, in their order."""
    return {part: parts[part] for part in PARTS if parts.get(part)}
