"""The ``galore`` section: AdamW on low-rank projections of gradients (Zhao et al., arXiv:2403.03507), by galore-torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lisa_ds.config.base import Section
from lisa_ds.config.targets import ALL_LINEAR, Targets, checked


class GaloreConfig(Section):
    """Which gradients are projected, and how their moments are kept."""

    rank: Annotated[int, Field(ge=1)] = 256
    """Rank r of the projection; a matrix with a smaller side is not reduced."""

    update_proj_gap: Annotated[int, Field(ge=1)] = 200
    """Steps between two projections, each by an SVD of the gradient (T in the paper)."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.25
    """Factor on the learning rate of the projected matrices (alpha in the paper)."""

    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """The side that is projected: ``std`` is the shorter one, ``reverse_std`` the longer; ``full`` is both."""

    targets: Annotated[Targets, BeforeValidator(checked)] = ALL_LINEAR
    """Which linears: ``all-linear`` (all but the head), names that a module's path ends with or contains (``[attn, mlp]``), or one
    regular expression for whole paths. Everything else trains by AdamW."""

    moments: Literal["model", "int8"] = "model"
    """``model``: the moments in the type of the gradients. ``int8``: in 8 bits with a scale for each 256; on a GPU by
    bitsandbytes, on a CPU by lisa_ds."""

    layerwise: bool = False
    """Each parameter is stepped as soon as its gradient is there, so that only one gradient exists at a time: on one rank, with
    ``gradient_accumulation_steps: 1``, without clipping."""

    master_weights: bool = False
    """With ``training.bf16``: keep weights, gradients and moments in fp32, and compute in bf16 by autocast. Without, all are bf16,
    as published, and an update below 1/256 of a weight is lost."""
