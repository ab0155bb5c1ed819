"""LISA under ZeRO-3: optimizer state for the drawn blocks, and for the roles that train beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import ROLES, policy_of
from lisa_ds.memory.architectures import Architecture
from lisa_ds.memory.gradients import GradientSettings
from lisa_ds.memory.matrices import shape_of, trained, worst
from lisa_ds.memory.methods.base import Candidate, UnderZero3, added, total
from lisa_ds.memory.probe import probe_bytes
from lisa_ds.memory.residents import Residents, by_part, residents
from lisa_ds.memory.run_settings import RunSettings
from lisa_ds.memory.state import ModelShape, Precision, default_bucket, partitions, plan, state_bytes
from lisa_ds.memory.step import Sampled, StepPeaks, StepSettings, step_peaks
from lisa_ds.memory.tape import Adapters


class Lisa(UnderZero3):
    """LISA; the largest draw is planned, unless a draw is given."""

    name = "lisa"
    title = "LISA"
    chooses_bucket = True
    casts_gradients = False  # one launch reads them as they are
    forgets_inputs = True

    def residents(
        self,
        architecture: Architecture,
        run: RunSettings,
        sampled: Collection[int] | None = None,
        roles: Collection[str] | None = None,
    ) -> Residents:
        """See the base class."""
        shape = shape_of(architecture, run.lisa)
        may, steady = (shape.roles(run.lisa, always=only) for only in (False, True))
        trains = may if roles is None else list(roles)
        by_matrix = shape.of_blocks is not None
        draw = _worst(shape, run.lisa) if sampled is None else list(sampled)
        blocks: Sampled = draw
        if by_matrix:
            blocks = worst(architecture, run.lisa)[0] if sampled is None else trained(architecture, draw)
        if sampled is None and (trains == may or by_matrix):
            table = plan(shape, run.lisa, world_size=run.world_size, precision=_precision(run)).most
        else:
            table = state_bytes(shape, sampled=draw, roles=trains, world_size=run.world_size, precision=_precision(run))
        none = state_bytes(
            replace(shape, layers=()), sampled=[], roles=steady, world_size=run.world_size, precision=_precision(run)
        )
        units = [*shape.layers, *(getattr(shape, role) for role in may)]
        held = residents(
            shape,
            run,
            by_part(table),
            trained=[numel for unit in units for numel in unit],
            blocks=blocks,
            roles=trains,
            comes=[role for role in may if role not in steady],
            always_moments=none["exp_avg"] + none["exp_avg_sq"],
        )
        stepped = [*shape.layers, *(getattr(shape, role) for role in trains)]  # a unit is a sub-group
        return replace(held, sub_group=max(sum(partitions(unit, run.world_size)) for unit in stepped))

    def peaks(self, architecture: Architecture, run: RunSettings, settings: StepSettings, held: Residents) -> StepPeaks:
        """See the base class: of matrices, those of several draws that could be the worst."""
        if run.lisa.unit == "block":
            return super().peaks(architecture, run, settings, held)
        draws: list[Sampled] = [*worst(architecture, run.lisa)]
        draws = draws if held.blocks in draws else [held.blocks]  # a draw that was given
        found = [step_peaks(architecture, settings, sampled=draw, roles=held.roles) for draw in draws]
        forward, backward = (
            max((getattr(peak, phase) for peak in found), key=total) for phase in ("forward", "backward")
        )
        return replace(found[0], forward=forward, backward=backward)

    def adapters(self, architecture: Architecture, run: RunSettings) -> Mapping[int, Adapters]:
        """See the base class."""
        given = run.lisa.adapters
        if given is None:
            return {}
        chosen = architecture.chosen(given.targets, inside=False, conv1d=True)
        return {block: Adapters(given.rank, places) for block, places in chosen.items()}

    def default_bucket(self, shape: ModelShape) -> int:
        """See the base class."""
        return default_bucket(shape)

    def least(self, shape: ModelShape, run: RunSettings) -> int:
        """All of the model state, for the largest draw."""
        return sum(plan(shape, run.lisa, world_size=run.world_size, precision=_precision(run)).most.values())

    def own_phases(
        self,
        architecture: Architecture,
        run: RunSettings,
        settings: StepSettings,
        held: Residents,
        state: Mapping[str, int],
        phases: Mapping[str, dict[str, int]],
    ) -> dict[str, dict[str, int]]:
        """Scoring, if it takes passes of its own, and a switch."""
        own = {}
        if run.lisa.sampler.calibrates:
            own["scores"] = added(state, *_scoring(architecture, run, settings))
        small = {"gathered": phases["step"]["gathered"]}
        own["switch"] = max((phases["step"], _switch(state, small, held, run)), key=total)
        return own

    def summary(self, run: RunSettings, *, tied: bool) -> str:
        """See the base class."""
        lisa = run.lisa
        trains = []
        for role in ROLES:
            policy = policy_of(lisa, role, tied=tied)
            if role == "block_rest" and lisa.unit == "block":
                continue
            if policy != "never" and not (tied and role == "lm_head"):
                trains.append(role if policy == "always" else f"{role} ({policy})")
        if lisa.sampler.layers:
            drawn = f"layers {list(lisa.sampler.layers)}"
        elif lisa.sampling_ratio is not None:
            drawn = f"{lisa.sampling_ratio:.0%} of the layers"
        else:
            drawn = f"{lisa.num_sampled_layers} layers at a time"
        if lisa.unit == "matrix":
            drawn = f"matrices of {drawn.replace(' at a time', '')}' size at a time"
        if lisa.growth is not None:
            drawn += f", later up to {lisa.growth.largest()[1]}"
        return f"{self.title}: {drawn}" + (f" and {', '.join(trains)}" if trains else "")

    def changes(self, run: RunSettings) -> Iterator[Candidate]:
        """See the base class."""
        lisa = run.lisa
        fuses = lisa.optimizer.name == "masked_adamw"
        if fuses:
            yield "lisa.optimizer.moments=int8", "moments in 8 bits", _with_optimizer(moments="int8")
        for role, what in (("embeddings", "the embeddings do not train"), ("lm_head", "the head does not train")):
            rate = "" if getattr(lisa, f"{role}_lr_scale") == 1 else f" lisa.{role}_lr_scale=1"
            yield f"lisa.{role}=never{rate}", what, _with(**{role: "never", f"{role}_lr_scale": 1.0})
        if lisa.growth is not None:
            yield "lisa.growth=null", "no more layers are added later", _with(growth=None)
        if not lisa.sampler.layers and lisa.num_sampled_layers > 1 and lisa.sampling_ratio is None:
            yield "lisa.num_sampled_layers=1", "one block at a time trains", _with(num_sampled_layers=1)
        if fuses and run.bf16:
            yield (
                "lisa.optimizer.precision=stochastic_rounding",
                "no fp32 master copy; weights are rounded at random",
                _with_optimizer(precision="stochastic_rounding"),
            )

    def offloads(self, run: RunSettings) -> bool:
        """See the base class: not under stochastic rounding, which updates the weights where the gradients are."""
        return run.lisa.optimizer.precision != "stochastic_rounding"


def _with(**fields: Any) -> Callable[[RunSettings], RunSettings]:
    return lambda run: replace(run, lisa=run.lisa.model_copy(update=fields))


def _with_optimizer(**fields: Any) -> Callable[[RunSettings], RunSettings]:
    return lambda run: _with(optimizer=run.lisa.optimizer.model_copy(update=fields))(run)


def _precision(run: RunSettings) -> Precision:
    return Precision.of_lisa(run.lisa, run.width, run.gradient_width)


def _worst(shape: ModelShape, lisa: LisaConfig) -> list[int]:
    """The blocks of the draw that takes the most memory: the lowest ones, for which backward runs furthest."""
    if lisa.sampler.layers:
        return list(lisa.sampler.layers)
    count = shape.num_blocks if lisa.sampler.varies else lisa.most_sampled(shape.num_blocks)
    return list(range(count))


def _scoring(
    architecture: Architecture, run: RunSettings, settings: StepSettings
) -> tuple[dict[str, int], dict[str, int]]:
    """The peak of scoring blocks by their gradients: a backward pass for those scored together, and what it keeps."""
    kind = run.lisa.sampler.kind
    assert kind.probe is not None
    count = len(architecture.shape.layers)
    together = min(run.lisa.sampler.probe_blocks, count) if kind.by_windows else count
    rows = run.sequence if kind.by_row else run.tokens
    # Gradients are taken one by one, and no bucket is filled; from the lowest blocks backward has the longest way. ZeRO-3 does not
    # know the order of such a pass, so it fetches nothing ahead and holds nothing back.
    alone = replace(settings.gather, prefetch_bucket_size=0, max_reuse_distance=0)
    peaks = step_peaks(
        architecture,
        replace(settings, tokens=rows, gradients=GradientSettings(), gather=alone),
        sampled=range(together),
        roles=(),
    ).backward
    own = {part: size for part, size in peaks.items() if part != "gradients in flight"}
    kept = probe_bytes(
        architecture.shape, kind=kind.probe, probe_blocks=together, world_size=run.world_size, weight_bytes=run.width
    )
    return own, {"scratch": kept}


def _switch(state: Mapping[str, int], small: Mapping[str, int], held: Residents, run: RunSettings) -> dict[str, int]:
    """The peak of a switch: old gradients and state are freed, new units copied to fp32, then gradients allocated anew.

    New units have no moments before their first step.
    """
    if run.offload_optimizer:
        return added(state, small)
    after = {**state, "moments": held.always_moments}
    cast = 4 * held.switched if state["master"] and run.width < 4 else 0
    copying = {**after, "gradients": 0}
    return max((added(copying, small, {"scratch": cast}), added(after, small)), key=total)
