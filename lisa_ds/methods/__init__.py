"""Applies ``method`` of a run file to its model and trainer; everything else of the run stays equal.

An object for each method, of one shape (:class:`~lisa_ds.methods.base.Method`): ``lisa``, ``full``, ``lora``, ``galore``.
"""

from __future__ import annotations

from lisa_ds.config import RunConfig
from lisa_ds.methods.base import Method as Method
from lisa_ds.methods.full import Full
from lisa_ds.methods.galore import Galore
from lisa_ds.methods.lisa import Lisa
from lisa_ds.methods.lora import Lora

__all__ = ["METHODS", "Method", "of"]

METHODS: dict[str, Method] = {method.name: method for method in (Lisa(), Full(), Lora(), Galore())}
"""The methods by their name in run files."""


def of(config: RunConfig) -> Method:
    """The method of a run."""
    return METHODS[config.method]
