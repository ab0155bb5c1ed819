"""The ``sampler`` and ``growth`` sections: how layers are drawn, by which scores, and how many."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, model_validator

from lisa_ds.config.base import PathName, Section, mistake
from lisa_ds.config.sampler_kinds import KINDS, MEASURES, Kind, Name

Count = Annotated[int, Field(ge=1)]


def named(value: Any) -> Any:
    """Read a bare name as a section that has it: ``cyclic`` as ``{name: cyclic}``."""
    return {"name": value} if isinstance(value, str) else value


class SamplerConfig(Section):
    """How the layers of an interval are drawn."""

    name: Name = "uniform"
    """``uniform``: without replacement in a draw. ``cyclic``: every layer once a cycle, reshuffled each cycle.
    ``bernoulli``: each layer with probability num_sampled_layers / layers, the paper's Algorithm 1. ``fixed``: the
    same layers for the whole run, those of ``layers`` or drawn once. The others draw by scores of the layers:
    ``fixed_scores``: those of a file that ``lisa-ds profile`` wrote. ``weight_norm``: the norms of the weights, or with
    ``lora_norms`` and ``full_norms`` the paper's ratio of them. ``grad_norm``: the norms of gradients. ``fisher``: the
    curvature of the loss."""

    layers: Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(strict=False)] | None = None
    """``fixed`` only: the layers to train, counted from 0; left out, they are drawn once."""

    file: PathName | None = None
    """``fixed_scores`` only: the file of scores."""

    lora_norms: PathName | None = None
    """``weight_norm`` only, with ``full_norms``: layer statistics of a LoRA run, whose mean weight norms are divided by those of a
    full one: the probabilities of the LISA paper's section 3.2. A run's ``layers.jsonl``."""

    full_norms: PathName | None = None
    """``weight_norm`` only: layer statistics of a full fine-tuning run."""

    score: Literal["accumulated", "mean", "ema"] = "accumulated"
    """``grad_norm`` only. ``accumulated``: gradients are added up over calibration batches, and a layer's score is the sum of
    its parameters' norms. ``mean``: the mean over calibration batches of the norm of a layer's gradient. ``ema``: a
    moving average of that norm over training batches, for the layers that train: free, but a layer has no score of its
    own until it is drawn."""

    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """``grad_norm`` with score ``ema``: how much of the average stays when a layer has trained for another interval."""

    estimator: Literal["empirical", "hutchinson"] = "empirical"
    """``fisher`` only. ``empirical``: the trace of the diagonal empirical Fisher information. ``hutchinson``:
    Hutchinson's estimate of the trace of the Hessian, with Rademacher vectors."""

    calibration_batches: Count = 8
    """Calibration batches of each rank, on which scores are measured; one row each for the empirical Fisher
    information."""

    probe_blocks: Count = 1
    """Layers whose gradients are accumulated at a time: more take memory, fewer take more passes over the batches."""

    every: Count = 1
    """Intervals from one measurement of the scores to the next."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Temperature of a softmax over the scores, in units of their mean; left out, layers are drawn in proportion to
    their scores."""

    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The least probability of a layer, as a fraction of the uniform one: 0 lets layers starve, 1 draws uniformly."""

    draw: Literal["systematic", "successive", "bernoulli"] = "systematic"
    """``systematic``: always the same number, each layer with exactly its probability. ``successive``: one after the other,
    in proportion to the scores of those left, without a floor. ``bernoulli``: each layer on its own."""

    inverse_probability_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """If set, a layer's learning rate is multiplied by the uniform probability over its own, by at most this number: rarely drawn
    layers then take larger steps, and often drawn ones smaller."""

    @model_validator(mode="after")
    def _keys_belong_to_the_name(self) -> SamplerConfig:
        # A file that spells out every key may have the defaults of those that mean nothing to its sampler.
        keys = {key: field.default for key, field in type(self).model_fields.items() if key != "name"}
        given = [key for key, default in keys.items() if getattr(self, key) != default]
        for key in given:
            if key not in self.kind.own_keys():
                names = " or ".join(repr(name) for name, kind in KINDS.items() if key in kind.own_keys())
                raise mistake(f"{key} goes with name {names} only, but name is {self.name!r}")
        if (problem := self.kind.problem()) is not None:
            raise mistake(problem)
        for key, why in self.kind.unread():
            if key in given:
                raise mistake(f"{key} has no effect {why}; remove it")
        return self

    @property
    def kind(self) -> Kind:
        """The kind of sampler that ``name`` selects, with its own keys: asked instead of comparing names."""
        kind = KINDS[self.name]
        return kind(**{key: getattr(self, key) for key in kind.own_keys()})

    @property
    def by_scores(self) -> bool:
        """Whether layers are drawn by scores."""
        return self.kind.by_scores

    @property
    def varies(self) -> bool:
        """Whether the number of layers varies from draw to draw, down to none."""
        return self.kind.varies

    @property
    def calibrates(self) -> bool:
        """Whether scores are measured on calibration data."""
        return self.kind.calibrates

    def measuring(self, score: str | None) -> SamplerConfig:
        """A sampler that measures scores, on as much calibration data as this one if it sets that.

        Args:
            score: One of :data:`~lisa_ds.config.sampler_kinds.MEASURES`; None for what this one measures, or else the first.
        """
        if score is None and self.kind.measure is not None:
            return self
        keys = MEASURES[score or next(iter(MEASURES))]
        read = SamplerConfig(**keys).kind
        unread = dict(read.unread())
        amounts = [
            key for key in ("calibration_batches", "probe_blocks") if key in read.own_keys() and key not in unread
        ]
        return SamplerConfig(**keys, **{key: getattr(self, key) for key in amounts})


class GrowthConfig(Section):
    """When more layers are drawn: at given intervals, or whenever the loss stops falling."""

    schedule: dict[Annotated[int, Field(ge=1, strict=False)], Count] | None = None  # not strict: keys of JSON are text
    """From which interval on how many layers are drawn: ``{10: 4, 20: 8}``."""

    patience: Count | None = None
    """Intervals without a lower mean training loss after which ``add`` more layers are drawn."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Fraction by which the loss of an interval must be below the lowest so far to count as lower."""

    add: Count = 1
    """Layers that are added at a time."""

    max_layers: Count | None = None
    """The most layers that are drawn; needed with ``patience``."""

    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """With ``patience``: no layers are added whose model state would take a rank to more than this, in GB (1e9 bytes)."""

    @model_validator(mode="after")
    def _one_way_to_grow(self) -> GrowthConfig:
        if (self.schedule is None) == (self.patience is None):
            raise mistake("give either schedule (at which intervals) or patience (when the loss stops falling)")
        if self.schedule is not None:
            if not self.schedule:
                raise mistake("schedule is empty: name at least one interval, as in {10: 4}")
            for key in ("threshold", "add", "max_layers", "memory_gb"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise mistake(f"{key} goes with patience only, but schedule says when layers are added")
        elif self.max_layers is None:
            raise mistake("max_layers is needed with patience, to plan the memory of the run")
        return self

    def largest(self) -> tuple[str, int]:
        """The key that says how many layers are drawn at most, and that number."""
        if self.schedule is not None:
            return "schedule", max(self.schedule.values())
        assert self.max_layers is not None
        return "max_layers", self.max_layers
