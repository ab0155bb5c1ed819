"""The methods that are planned beside each other: an object each, in the order in which they are told."""

from __future__ import annotations

from lisa_ds.memory.methods.base import Candidate as Candidate
from lisa_ds.memory.methods.base import Method as Method
from lisa_ds.memory.methods.full import Full
from lisa_ds.memory.methods.galore import Galore
from lisa_ds.memory.methods.lisa import Lisa
from lisa_ds.memory.methods.lora import Lora

__all__ = ["METHODS", "Candidate", "Method"]

METHODS: dict[str, Method] = {method.name: method for method in (Lisa(), Full(), Lora(), Galore())}
"""By the name that run files have for it; those that cannot be run yet are planned all the same."""
