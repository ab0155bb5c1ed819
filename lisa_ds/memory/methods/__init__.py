"""The methods of fine-tuning that a plan compares: an object each, in the order of its report."""

from __future__ import annotations

from lisa_ds.memory.methods.base import Candidate as Candidate
from lisa_ds.memory.methods.base import Method as Method
from lisa_ds.memory.methods.full import Full
from lisa_ds.memory.methods.galore import Galore
from lisa_ds.memory.methods.lisa import Lisa
from lisa_ds.memory.methods.lora import Lora

__all__ = ["METHODS", "Candidate", "Method"]

METHODS: dict[str, Method] = {method.name: method for method in (Lisa(), Full(), Lora(), Galore())}
"""The methods by their name in run files; methods that cannot be run yet are planned, too."""
