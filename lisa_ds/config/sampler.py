"""The keys that say which layers are drawn, how often each, and how many."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, model_validator

from lisa_ds.config.base import PathName, Section, mistake

Count = Annotated[int, Field(ge=1)]

_BY_SCORES = ("fixed_scores", "weight_norm", "grad_norm", "fisher")
# Which samplers a key means something to.
_GOES_WITH: dict[str, tuple[str, ...]] = {
    "layers": ("fixed",),
    "file": ("fixed_scores",),
    "lora_norms": ("weight_norm",),
    "full_norms": ("weight_norm",),
    "score": ("grad_norm",),
    "ema_decay": ("grad_norm",),
    "estimator": ("fisher",),
    "calibration_batches": ("grad_norm", "fisher"),
    "probe_blocks": ("grad_norm", "fisher"),
    "every": ("weight_norm", "grad_norm", "fisher"),
    **dict.fromkeys(("temperature", "floor", "draw", "inverse_probability_cap"), _BY_SCORES),
}


def named(value: Any) -> Any:
    """Read a bare name as a section that has it: ``cyclic`` as ``{name: cyclic}``."""
    return {"name": value} if isinstance(value, str) else value


class SamplerConfig(Section):
    """How the layers of an interval are drawn."""

    name: Literal["uniform", "cyclic", "bernoulli", "fixed", "fixed_scores", "weight_norm", "grad_norm", "fisher"] = (
        "uniform"
    )
    """``uniform``: without replacement in a draw. ``cyclic``: every layer once a cycle, reshuffled each cycle.
    ``bernoulli``: each layer with probability num_sampled_layers / layers, the paper's Algorithm 1. ``fixed``: the
    same layers for the whole run, those of ``layers`` or drawn once. The others draw by scores of the layers:
    ``fixed_scores``: those of a file that ``lisa-ds profile`` wrote. ``weight_norm``: the norms of the weights, or with
    ``lora_norms`` and ``full_norms`` the paper's ratio of them. ``grad_norm``: the norms of gradients. ``fisher``: how
    strongly the loss is curved."""

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
    its parameters' norms. ``mean``: the mean over calibration batches of the norm of a layer's gradient. ``ema``: the same of the
    training batches, of the layers that train, as a moving average: costs nothing, but knows a layer only once it was drawn."""

    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """``grad_norm`` with score ``ema``: how much of the average stays when a layer has trained for another interval."""

    estimator: Literal["empirical", "hutchinson"] = "empirical"
    """``fisher`` only. ``empirical``: the trace of the diagonal empirical Fisher information. ``hutchinson``: an estimate of the
    trace of the Hessian."""

    calibration_batches: Count = 8
    """Batches of a rank on which scores are measured; one row each for the empirical Fisher information."""

    probe_blocks: Count = 1
    """Layers whose gradients are accumulated at a time: more take memory, fewer take more passes over the batches."""

    every: Count = 1
    """Intervals from one measurement of the scores to the next."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of a softmax over the scores, in units of their mean; left out, layers are drawn in proportion to their scores."""

    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The least probability of a layer as a part of the uniform one: 0 lets layers starve, 1 draws uniformly."""

    draw: Literal["systematic", "successive", "bernoulli"] = "systematic"
    """``systematic``: always the same number, each layer with exactly its probability. ``successive``: one after the other,
    in proportion to the scores of those left, without a floor. ``bernoulli``: each layer on its own."""

    inverse_probability_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """If set, a layer's learning rate is multiplied by the uniform probability over its own, by at most this number: rarely drawn
    layers then take larger steps, and often drawn ones smaller."""

    @model_validator(mode="after")
    def _keys_belong_to_the_name(self) -> SamplerConfig:
        # A file that spells out every key may have the defaults of those that mean nothing to its sampler.
        given = [key for key in _GOES_WITH if getattr(self, key) != type(self).model_fields[key].default]
        for key in given:
            if self.name not in (names := _GOES_WITH[key]):
                raise mistake(f"{key} goes with name {' or '.join(map(repr, names))} only, but name is {self.name!r}")
        if self.layers == ():
            raise mistake("layers is empty: name at least one, or leave it out to draw them once")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise mistake(f"layers names a layer twice: {list(self.layers)}")
        if self.name == "fixed_scores" and self.file is None:
            raise mistake("name 'fixed_scores' needs a file of scores; `lisa-ds profile` writes one")
        if (self.lora_norms is None) != (self.full_norms is None):
            raise mistake("lora_norms and full_norms go together: the scores are their ratio")
        if self.lora_norms is not None and "every" in given:
            raise mistake("every has no effect on norms that were recorded once; remove it")
        for key, reads in (
            ("ema_decay", self.score == "ema"),
            ("calibration_batches", self.score != "ema"),
            (
                "probe_blocks",
                self.score == "accumulated" if self.name == "grad_norm" else self.estimator == "hutchinson",
            ),
            ("every", self.score != "ema"),
            ("floor", self.draw != "successive"),
        ):
            if key in given and not reads:
                kind = {"floor": f"draw {self.draw!r}"}.get(
                    key, f"score {self.score!r}" if self.name == "grad_norm" else f"estimator {self.estimator!r}"
                )
                raise mistake(f"{key} has no effect with {kind}; remove it")
        return self

    @property
    def by_scores(self) -> bool:
        """Whether layers are drawn by scores."""
        return self.name in _BY_SCORES

    @property
    def varies(self) -> bool:
        """Whether the number of layers varies from draw to draw, down to none."""
        return self.name == "bernoulli" or (self.by_scores and self.draw == "bernoulli")

    @property
    def calibrates(self) -> bool:
        """Whether scores are measured on calibration data."""
        return self.name == "fisher" or (self.name == "grad_norm" and self.score != "ema")


class GrowthConfig(Section):
    """When more layers are drawn: at given intervals, or whenever the loss stops falling."""

    schedule: dict[Annotated[int, Field(ge=1, strict=False)], Count] | None = None  # not strict: keys of JSON are text
    """From which interval on how many layers are drawn: ``{10: 4, 20: 8}``."""

    patience: Count | None = None
    """Intervals without a lower mean training loss after which ``add`` more layers are drawn."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """By which part the loss of an interval has to be below the lowest so far to count as lower."""

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
