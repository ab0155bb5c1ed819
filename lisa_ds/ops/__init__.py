"""Masked AdamW: one launch over every sampled segment.

``segments`` describes the input of a launch, ``reference`` is the specification; ``cpu``, ``triton`` and ``cuda`` are
tested against it, and ``dispatch`` chooses among them.
"""

from __future__ import annotations

from lisa_ds.ops.dispatch import BACKENDS as BACKENDS
from lisa_ds.ops.dispatch import Backend as Backend
from lisa_ds.ops.dispatch import default_backend as default_backend
from lisa_ds.ops.dispatch import masked_adamw_ as masked_adamw_
from lisa_ds.ops.dispatch import sum_of_squares as sum_of_squares
from lisa_ds.ops.dispatch import unavailable as unavailable
from lisa_ds.ops.segments import Hyper as Hyper
from lisa_ds.ops.segments import Segment as Segment
from lisa_ds.ops.segments import SegmentTable as SegmentTable

__all__ = [
    "BACKENDS",
    "Backend",
    "Hyper",
    "Segment",
    "SegmentTable",
    "default_backend",
    "masked_adamw_",
    "sum_of_squares",
    "unavailable",
]
