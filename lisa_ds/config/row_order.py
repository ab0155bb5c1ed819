"""What decides which rows are in which step, under the names of a run file's keys, and where two runs differ in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SEEDED = ("random", "group_by_length")
"""Sampling strategies whose order the run's seed decides."""

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys by which the rows of two runs differ; none if the same rows are in the same steps.

    The rows of a step may be split into micro-batches differently, unless incomplete steps are dropped.

    Args:
        ours: Of one run, see :func:`lisa_ds.integrations.order.order_of`.
        theirs: Of the other.
    """
    changed = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if rows_of_step(ours) == rows_of_step(theirs) and not theirs.get("dataloader_drop_last"):
        changed = [key for key in changed if key not in SIZES]
    if theirs.get("train_sampling_strategy", SEEDED[0]) not in SEEDED:
        changed = [key for key in changed if key != "seed"]
    return changed


def rows_of_step(order: Mapping[str, Any]) -> int:
    """Rows of a rank in a step."""
    sizes = [int(order[key]) for key in SIZES]
    return sizes[0] * sizes[1]
