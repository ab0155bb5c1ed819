"""The ``lisa`` section: which layers train, for how long, and what becomes of their optimizer state."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lisa_ds.config.adapters import AdaptersConfig
from lisa_ds.config.base import NOT_BUILT, Origin, Section, mistake, not_built, show, validate
from lisa_ds.config.files import read_mapping
from lisa_ds.config.formats import Moments, Weights
from lisa_ds.config.roles import ROLES, Fixed, Policy
from lisa_ds.config.sampler import Count, GrowthConfig, SamplerConfig, named
from lisa_ds.errors import ConfigError

# What other tools call our keys. Accepted in files and on the command line, with a notice.
ALIASES = {
    "lisa_activated_layers": "num_sampled_layers",  # LMFlow, ms-swift
    "lisa_interval_steps": "interval_steps",  # LMFlow
    "lisa_layers_attribute": "layers_path",  # LMFlow, axolotl
    "lisa_n_layers": "num_sampled_layers",  # axolotl
    "lisa_step_interval": "interval_steps",  # axolotl, ms-swift
    "switch_block_every": "interval_steps",  # BAdam
}

_log = logging.getLogger(__name__)
_noticed: set[str] = set()


def _interval(value: Any) -> Any:
    if isinstance(value, str) and (epochs := re.fullmatch(r"([1-9][0-9]*) ?epochs?", value)):
        return f"{epochs[1]}epoch"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise mistake('should be a number of optimizer steps, 1 or more, or epochs as "1epoch"')
    return value


Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
GrowthLimit = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class OptimizerConfig(Section):
    """The optimizer of the sampled layers."""

    name: Literal["masked_adamw", "adamw"] = "masked_adamw"
    """``masked_adamw``: AdamW as one kernel launch over all sampled layers, in place of the AdamW that the engine is
    given. ``adamw``: the optimizer that the engine is given, of any kind, one sub-group at a time."""

    precision: Weights = "mixed"
    """``mixed``: 16-bit weights with an fp32 master copy (plain fp32 if the model is fp32). ``stochastic_rounding``: bf16
    weights without one, rounded at random."""

    moments: Moments = "fp32"
    """What the two moments are kept in: ``fp32``, ``bf16`` (with stochastic rounding only), or ``int8``. ``none``: there are none,
    and each step is AdamW's first, which moves every weight by about the learning rate against the sign of its gradient."""

    @model_validator(mode="after")
    def _go_together(self) -> OptimizerConfig:
        if self.name == "adamw":
            for key, only in (("precision", "mixed"), ("moments", "fp32")):
                if getattr(self, key) != only:
                    raise mistake(f"{key} {getattr(self, key)!r} is masked_adamw's; with name 'adamw' it is {only!r}")
        if self.precision == "mixed" and self.moments == "bf16":
            raise mistake("moments 'bf16' goes with precision 'stochastic_rounding'; use 'fp32' or 'int8'")
        return self


class LisaConfig(Section):
    """Which layers train, for how long, and what they leave behind."""

    unit: Literal["block", "matrix"] = "block"
    """What is drawn: whole layers (``block``), or single weight matrices anywhere in depth (``matrix``)."""

    num_sampled_layers: Count = 2
    """Layers trained in one interval (gamma in the paper). With ``unit: matrix`` a budget: matrices with as many elements as
    that many layers have on average."""

    sampling_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a share of the model's layers, rounded down. Instead of ``num_sampled_layers``. With ``unit: matrix`` the share
    of the elements of all layers."""

    interval_steps: Annotated[int | str, BeforeValidator(_interval)] = 20
    """Optimizer steps between two draws (K in the paper), or ``"1epoch"``. Micro-steps do not count."""

    seed: int = 0
    """Seed of the draws. They depend on this and the interval alone; by scores, on the scores, too."""

    layers_path: Annotated[str, Field(min_length=1)] = "auto"
    """Dotted path from the model to its block stack (several: separated by commas), or ``auto``."""

    sampler: Annotated[SamplerConfig, BeforeValidator(named)] = Field(default_factory=SamplerConfig)
    """How layers are drawn; ``sampler: cyclic`` is short for ``sampler: {name: cyclic}``."""

    growth: GrowthConfig | None = None
    """Whether more layers are drawn later on; None for the same number all along."""

    embeddings: Policy = "always"
    """When the embeddings train: ``always``, ``never``, ``sampled`` (in an interval with the probability that a block has in the
    first draw, by a draw of their own), or ``{every: n}`` (in intervals 0, n, 2n, ...)."""

    lm_head: Policy = "always"
    """When the head trains, with the same values. A head that is tied to the embeddings follows their policy."""

    rest: Fixed = "always"
    """Whether (``always`` or ``never``) what is in neither blocks, embeddings nor head trains: the final norm and the like."""

    block_rest: Literal["always", "never", "with_block"] = "always"
    """``unit: matrix`` only: when the small parameters of layers train (norms, gates, biases without a matrix). ``with_block``: those
    of a layer when any of its matrices does."""

    embeddings_lr_scale: Scale = 1.0
    """Factor on the learning rate of the embeddings."""

    lm_head_lr_scale: Scale = 1.0
    """Factor on the learning rate of the head."""

    rest_lr_scale: Scale = 1.0
    """Factor on the learning rate of the rest."""

    block_rest_lr_scale: Scale = 1.0
    """Factor on the learning rate of the small parameters of layers, where they train ``always``."""

    adapters: AdaptersConfig | None = None
    """LoRA adapters that train in every interval beside what is drawn; ``null`` for none."""

    rewarm_steps: Annotated[int, Field(ge=0)] = 0
    """Steps n of learning-rate warm-up for units that begin to train, at a switch or at the start: from 1/n of the rate
    to all of it; 0 for none. Units that train ``always``, and blocks drawn twice in a row, keep their rate."""

    norm_growth_limit: GrowthLimit | None = None
    """Factor, above 1, by which the norm of a unit's gradient (a block's, the embeddings', the head's, the rest's) may grow from
    one step to the next; a larger gradient is scaled down to it, before clipping. ``null`` for no limit."""

    on_release: Annotated[Literal["drop"], not_built(host="parking of layer state", nvme="parking of layer state")] = (
        "drop"
    )
    """What becomes of a layer's optimizer state when it leaves the draw: ``drop``, as in the paper."""

    state_format: Annotated[Literal["fp32"], not_built(int8="parking of layer state")] = "fp32"
    """Format of the state that is kept."""

    nvme_path: Annotated[None, BeforeValidator(lambda value: _unset(value, "parking of layer state"))] = None
    """Directory for state kept on NVMe."""

    prefetch_steps: Annotated[int, BeforeValidator(lambda value: _unset(value, "parking of layer state"))] = 0
    """Steps ahead of a switch at which state starts to move."""

    optimizer: Annotated[OptimizerConfig, BeforeValidator(named)] = Field(default_factory=OptimizerConfig)
    """The optimizer of the sampled layers."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> LisaConfig:
        if self.sampling_ratio is not None and "num_sampled_layers" in self.model_fields_set:
            raise mistake(
                f"num_sampled_layers ({self.num_sampled_layers}) and sampling_ratio ({self.sampling_ratio}) "
                "say the same thing: keep one"
            )
        if layers := self.sampler.layers:
            if self.sampling_ratio is not None:
                raise mistake("sampling_ratio does not go with sampler 'fixed', which names its layers")
            if "num_sampled_layers" in self.model_fields_set and self.num_sampled_layers != len(layers):
                raise mistake(
                    f"num_sampled_layers is {self.num_sampled_layers}, but sampler.layers names {len(layers)}: "
                    "leave num_sampled_layers out"
                )
        if self.growth and self.sampler.kind.same_all_along:
            raise mistake("growth does not go with sampler 'fixed', whose layers are the same for the whole run")
        if self.unit == "matrix":
            self._check_matrices()
        else:
            for key in ("block_rest", "block_rest_lr_scale"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise mistake(f"{key} is of unit 'matrix'; with unit 'block' layers are drawn whole: remove one")
        for part in (role for role in ROLES if role != "adapters"):
            if getattr(self, part) == "never" and getattr(self, f"{part}_lr_scale") != 1:
                raise mistake(f"{part}_lr_scale has no effect with {part}: never; remove one of them")
        return self

    def _check_matrices(self) -> None:
        if self.sampler.layers:
            raise mistake("unit 'matrix' does not go with sampler.layers, which names whole layers; remove one")
        if self.sampler.varies:
            raise mistake(
                "unit 'matrix' draws within a budget, which 'bernoulli' would exceed; use 'uniform' or 'cyclic'"
            )
        if self.growth and self.sampling_ratio is not None:
            raise mistake(
                "growth counts in layers: with unit 'matrix' give num_sampled_layers in place of sampling_ratio"
            )
        if self.block_rest == "with_block" and self.block_rest_lr_scale != 1:
            raise mistake("block_rest_lr_scale has no effect with block_rest: with_block; remove one of them")
        if self.sampler.kind.calibrates:
            raise mistake(
                f"unit 'matrix': sampler {self.sampler.name!r} measures whole layers; use another, or unit 'block'"
            )

    def lr_scale_of(self, role: str) -> float:
        """Factor on the learning rate of a role; a tied weight belongs to the embeddings, and has theirs."""
        if role == "adapters":
            return 1.0 if self.adapters is None else self.adapters.learning_rate_scale
        scale: float = getattr(self, f"{role}_lr_scale")
        return scale

    @property
    def interval_epochs(self) -> int | None:
        """Epochs of one interval if ``interval_steps`` is given in epochs, else ``None``."""
        return int(self.interval_steps.removesuffix("epoch")) if isinstance(self.interval_steps, str) else None

    def num_sampled(self, num_layers: int) -> int:
        """Layers drawn in one interval of a model of ``num_layers`` (``bernoulli``: on average).

        Raises:
            ConfigError: The model has too few layers for what is asked.
        """
        if self.sampler.layers:
            if max(self.sampler.layers) >= num_layers:
                raise ConfigError(
                    f"{self.where('sampler.layers')}: the model has layers 0 to {num_layers - 1}, "
                    f"got {list(self.sampler.layers)}"
                )
            return len(self.sampler.layers)
        if self.sampling_ratio is None:
            if self.num_sampled_layers > num_layers:
                raise ConfigError(
                    f"{self.where('num_sampled_layers')}: the model has {num_layers} layers, "
                    f"got {self.num_sampled_layers}; choose 1 to {num_layers}, "
                    "or check that layers_path leads to the block stack"
                )
            return self.num_sampled_layers
        count = int(self._ratio() * num_layers)
        if self.unit == "matrix":
            return max(1, count)
        if count == 0:
            raise ConfigError(
                f"{self.where('sampling_ratio')}: leaves no layer of the model's {num_layers}, "
                f"got {self.sampling_ratio}; it takes at least 1/{num_layers}, or set num_sampled_layers"
            )
        return count

    def share(self, num_layers: int) -> Fraction:
        """Share of a model of ``num_layers`` that one interval draws, by number or, of matrices, by elements; exact.

        Raises:
            ConfigError: See :meth:`num_sampled`.
        """
        if self.unit == "matrix" and self.sampling_ratio is not None:
            return self._ratio()
        return Fraction(self.num_sampled(num_layers), num_layers)

    def check_budget(self, budget: int, largest: int, elements: int) -> None:
        """Refuse a draw of matrices that has no room for the largest.

        Args:
            budget: Elements of matrices that the first draw may have.
            largest: Elements of the largest matrix, and of what trains beside it.
            elements: Of all that is drawn from.

        Raises:
            ConfigError: It has not.
        """
        if budget < largest:
            key = "num_sampled_layers" if self.sampling_ratio is None else "sampling_ratio"
            raise ConfigError(
                f"{self.where(key)}: a draw of matrices has {budget:,} elements at most, fewer than the largest matrix with "
                f"{largest:,}; set sampling_ratio to {largest / elements:.3g} or more"
            )

    def _ratio(self) -> Fraction:
        # As written in decimal: 0.29 * 100 is 28.999999999999996 in binary, and would lose a layer.
        return Fraction(repr(self.sampling_ratio))

    def most_sampled(self, num_layers: int) -> int:
        """The most layers that an interval of a model of ``num_layers`` may draw (``bernoulli``: on average).

        Raises:
            ConfigError: The model has too few layers for what is asked.
        """
        count = self.num_sampled(num_layers)
        if self.growth is None:
            return count
        key, most = self.growth.largest()
        if most > num_layers:
            raise ConfigError(f"{self.where(f'growth.{key}')}: the model has {num_layers} layers, got {most}")
        if self.growth.schedule is None and most < count:
            raise ConfigError(
                f"{self.where('growth.max_layers')}: is below the {count} layers that are drawn from the start, got {most}"
            )
        return max(count, most)

    @classmethod
    def load(cls, source: LisaConfig | Mapping[str, Any] | str | Path | None) -> LisaConfig:
        """Read the section from any form in which a caller has it.

        Args:
            source: A config as it is; the keys in a dict; a YAML or JSON file that holds the section alone or
                the ``lisa`` section of a whole run; or ``None`` for the defaults.

        Raises:
            ConfigError: Every mistake, one a line.
        """
        if isinstance(source, LisaConfig):
            return source
        if source is not None and not isinstance(source, (Mapping, str, Path)):
            raise ConfigError(
                f"lisa_config: should be a LisaConfig, a dict or the path of a file, got {type(source).__name__}"
            )
        file = str(source) if isinstance(source, (str, Path)) else "lisa_config"
        fields: Mapping[str, Any] = read_mapping(file) if isinstance(source, (str, Path)) else source or {}
        prefix = ""
        if "lisa" in fields or {"model", "data"} <= set(fields):  # a whole run; one of another method may lack it
            sections = ("model", "data", "method", "lisa", "lora", "galore", "training", "deepspeed", "statistics")
            if unknown := [key for key in fields if key not in sections]:
                raise ConfigError(
                    "\n".join(
                        f"{file}: {key}: unknown section; the sections are {', '.join(sections)}" for key in unknown
                    )
                )
            prefix, fields = "lisa", fields.get("lisa") or {}
            if not isinstance(fields, Mapping):
                raise ConfigError(f"{file}: lisa: should be a section of keys, got {show(fields)}")
        origin = Origin(file, prefix)
        problems: list[str] = []
        return validate(cls, rename_aliases(fields, origin, problems), origin, problems)


def rename_aliases(fields: Mapping[str, Any], origin: Origin, problems: list[str]) -> dict[str, Any]:
    """The same keys under our names; a key that is given under two names is added to ``problems``."""
    renamed: dict[str, Any] = {}
    for key, value in fields.items():
        name = ALIASES.get(key, key)
        if name in renamed:
            both = [other for other in fields if ALIASES.get(other, other) == name]
            problems.append(f"{origin.where(name)}: given under several names, {' and '.join(both)}: keep one")
        elif name != key:
            _notice(f"{origin.where(key)}: read as {name!r}, its name here")
        renamed.setdefault(name, value)
    return renamed


def _notice(text: str) -> None:
    # Once a process, and from one rank of a run: every rank reads the same file.
    if text not in _noticed and os.environ.get("RANK", "0") == "0":
        _log.warning(text)
    _noticed.add(text)


def _unset(value: Any, feature: str) -> Any:
    if value is not None and (value != 0 or isinstance(value, bool)):
        raise mistake(NOT_BUILT.format(feature=feature))
    return value
