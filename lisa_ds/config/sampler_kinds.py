"""The kinds of samplers: a class each, with the keys it reads and what other modules need to know of it.

A run file has one flat ``sampler`` section, :class:`~lisa_ds.config.sampler.SamplerConfig`. It may spell out every key
at its default, and its JSON enters the fingerprint of the schedule that a checkpoint is resumed by: a union of sections
would refuse the former and change the latter. So that section reads and checks the keys, and its ``kind`` is the class
of this module that it names, with the keys of that class alone. Code that needs to know something of a sampler asks the
kind; it does not compare names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

Name = Literal["uniform", "cyclic", "bernoulli", "fixed", "fixed_scores", "weight_norm", "grad_norm", "fisher"]


@dataclass(frozen=True)
class Kind:
    """Facts about a sampler; the defaults are those of one that draws all layers with equal probability."""

    name: ClassVar[Name]

    by_scores: ClassVar[bool] = False
    """Whether layers are drawn by scores."""

    same_all_along: ClassVar[bool] = False
    """Whether every interval has the same layers."""

    reads_file: ClassVar[bool] = False
    """Whether scores come from a file, and so are the same after a resume whatever was saved."""

    @classmethod
    def own_keys(cls) -> tuple[str, ...]:
        """The keys that mean something to it."""
        return tuple(field.name for field in fields(cls))

    @property
    def varies(self) -> bool:
        """Whether the number of layers varies from draw to draw, down to none."""
        return False

    @property
    def probe(self) -> str | None:
        """What passes over calibration data measure, one of :data:`PROBES`; None where there are no such passes."""
        return None

    @property
    def calibrates(self) -> bool:
        """Whether scores are measured on calibration data."""
        return self.probe is not None

    @property
    def by_windows(self) -> bool:
        """Whether a pass over calibration data measures only ``probe_blocks`` layers, not all at once."""
        return False

    @property
    def by_row(self) -> bool:
        """Whether a calibration batch is one row, whatever training has."""
        return False

    @property
    def measure(self) -> str | None:
        """The measure of the scores, by the name that files and checkpoints keep; None if no scores are measured."""
        return None if self.probe is None else f"{self.name}/{self.probe}"

    @property
    def watches_gradients(self) -> bool:
        """Whether scores come from the gradients of training."""
        return False

    def problem(self) -> str | None:
        """What is wrong with its keys; None if nothing is."""
        return None

    def unread(self) -> Iterator[tuple[str, str]]:
        """Its keys that have no effect beside the others, and why."""
        yield from ()


@dataclass(frozen=True)
class Uniform(Kind):
    """Layers are drawn uniformly, without replacement in a draw."""

    name = "uniform"


@dataclass(frozen=True)
class Cyclic(Kind):
    """Every layer once a cycle."""

    name = "cyclic"


@dataclass(frozen=True)
class Bernoulli(Kind):
    """Each layer is drawn on its own, with equal probability."""

    name = "bernoulli"

    @property
    def varies(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Fixed(Kind):
    """The same layers for the whole run."""

    name = "fixed"
    same_all_along = True

    layers: tuple[int, ...] | None

    def problem(self) -> str | None:
        """See the base class: no layers, or one named twice."""
        if self.layers == ():
            return "layers is empty: name at least one, or leave it out to draw them once"
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            return f"layers names a layer twice: {list(self.layers)}"
        return None


@dataclass(frozen=True, kw_only=True)
class ByScores(Kind):
    """The base of samplers that draw layers by scores, some more often than others."""

    by_scores = True

    temperature: float | None
    floor: float
    draw: str
    inverse_probability_cap: float | None

    @property
    def by_shares(self) -> bool:
        """Whether a draw takes the shares of layers, one after the other, and not their probabilities."""
        return self.draw == "successive"

    @property
    def varies(self) -> bool:
        """True if each layer is drawn on its own."""
        return self.draw == "bernoulli"

    def unread(self) -> Iterator[tuple[str, str]]:
        """See the base class: successive draws have no floor, as nothing sets their probabilities."""
        if self.by_shares:
            yield "floor", f"with draw {self.draw!r}"


@dataclass(frozen=True, kw_only=True)
class FixedScores(ByScores):
    """Scores come from a file."""

    name = "fixed_scores"
    reads_file = True

    file: str | None

    def problem(self) -> str | None:
        """See the base class: no file is named."""
        return None if self.file else "name 'fixed_scores' needs a file of scores; `lisa-ds profile` writes one"


@dataclass(frozen=True, kw_only=True)
class WeightNorm(ByScores):
    """Scores are the norms of the weights, or the ratios of two runs' norms."""

    name = "weight_norm"

    lora_norms: str | None
    full_norms: str | None
    every: int

    @property
    def reads_file(self) -> bool:  # type: ignore[override]
        """True if the norms of two runs are given."""
        return self.lora_norms is not None

    @property
    def measure(self) -> str | None:
        """The norms of the weights; None if the norms of two runs are given."""
        return None if self.reads_file else self.name

    def problem(self) -> str | None:
        """See the base class: one of the two files is missing."""
        if (self.lora_norms is None) != (self.full_norms is None):
            return "lora_norms and full_norms go together: the scores are their ratio"
        return None

    def unread(self) -> Iterator[tuple[str, str]]:
        """See the base class: norms from files are never measured anew."""
        if self.reads_file:
            yield "every", "on norms that were recorded once"
        yield from super().unread()


@dataclass(frozen=True, kw_only=True)
class GradNorm(ByScores):
    """Scores are norms of gradients."""

    name = "grad_norm"

    score: str
    ema_decay: float
    calibration_batches: int
    probe_blocks: int
    every: int

    @property
    def watches_gradients(self) -> bool:
        """True for a moving average."""
        return self.score == "ema"

    @property
    def probe(self) -> str | None:
        """The score; None for a moving average, which needs no passes of its own."""
        return None if self.watches_gradients else self.score

    @property
    def by_windows(self) -> bool:
        """True if sums of gradients are kept, which take memory."""
        return self.score == "accumulated"

    def unread(self) -> Iterator[tuple[str, str]]:
        """See the base class: it depends on the score."""
        why = f"with score {self.score!r}"
        if not self.watches_gradients:
            yield "ema_decay", why
        else:
            yield "calibration_batches", why
        if not self.by_windows:
            yield "probe_blocks", why
        if self.watches_gradients:
            yield "every", why
        yield from super().unread()


@dataclass(frozen=True, kw_only=True)
class Fisher(ByScores):
    """Scores measure the curvature of the loss."""

    name = "fisher"

    estimator: str
    calibration_batches: int
    probe_blocks: int
    every: int

    @property
    def probe(self) -> str | None:
        """The estimator."""
        return self.estimator

    @property
    def by_windows(self) -> bool:
        """True if weights are moved, of which copies are kept."""
        return self.estimator == "hutchinson"

    @property
    def by_row(self) -> bool:
        """True for the empirical Fisher information, which is of single rows."""
        return self.estimator == "empirical"

    def unread(self) -> Iterator[tuple[str, str]]:
        """See the base class: it depends on the estimator."""
        if not self.by_windows:
            yield "probe_blocks", f"with estimator {self.estimator!r}"
        yield from super().unread()


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Uniform, Cyclic, Bernoulli, Fixed, FixedScores, WeightNorm, GradNorm, Fisher)
}
"""Every kind by its name, in the order in which messages list them."""

MEASURES: dict[str, dict[str, Any]] = {
    "accumulated": {"name": GradNorm.name, "score": "accumulated"},
    "mean": {"name": GradNorm.name, "score": "mean"},
    "empirical": {"name": Fisher.name, "estimator": "empirical"},
    "hutchinson": {"name": Fisher.name, "estimator": "hutchinson"},
    "weight_norm": {"name": WeightNorm.name},
}
"""What ``lisa-ds profile`` can measure, with the keys of the sampler that measures it; the first is the default."""

PROBES = tuple(score for score in MEASURES if score != WeightNorm.name)
"""The measures that take passes over calibration data: norms of gradients in two ways, the curvature of the loss in
two."""
