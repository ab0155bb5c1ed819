"""Adapters beside the weights that LISA trains are added to these when they are saved whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names


@dataclass(frozen=True)
class Rule:
    """How adapters are added to weights: weight + scaling * up @ down."""

    scaling: float
    transposed: bool
    """Whether weights are ``(in, out)``, as in transformers' ``Conv1D``."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def rule_of(model: Any) -> Rule | None:
    """How the adapters of :func:`lisa_ds.add_adapters` are added; None for a model without."""
    found = getattr(model, "lisa_adapters", None)
    return None if found is None else Rule(**found)


def merged(weights: Mapping[str, Tensor], rule: Rule) -> dict[str, Tensor]:
    """Whole weights by their plain names, adapters added: in fp32, and rounded once to the weight's own type.

    Args:
        weights: By the names of the model with adapters.
        rule: How they are added.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith((_DOWN, _UP)):
            continue
        layer = name.partition(_BASE)[0]
        down, up = weights.get(f"{layer}{_DOWN}"), weights.get(f"{layer}{_UP}")
        if down is not None and up is not None and name == f"{layer}{_BASE}weight":
            change = rule.scaling * (up.float() @ down.float())
            weight = (weight.float() + (change.T if rule.transposed else change)).to(weight.dtype)
        found[name.replace(_BASE, ".")] = weight
    return found
