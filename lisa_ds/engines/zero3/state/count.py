"""Bytes of live optimizer state, counted from storages; for LISA's window and a stock ZeRO-3 optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lisa_ds.engines.common.storage import storage_bytes


def state_bytes(masters: Iterable[Tensor], moments: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of the state of what trains on this rank, by kind.

    Args:
        masters: The master copies, see :func:`own_masters`.
        moments: The optimizer's state for each.

    Returns:
        ``master``, ``exp_avg``, ``exp_avg_sq`` (with the scales of 8-bit moments), in bytes.
    """
    states = [state for state in moments if state]
    return {
        "master": storage_bytes(masters),
        **{
            moment: storage_bytes(state.get(key) for state in states for key in (moment, f"{moment}_scale"))
            for moment in ("exp_avg", "exp_avg_sq")
        },
    }


def own_masters(masters: Iterable[Tensor], weights: Iterable[Tensor]) -> list[Tensor]:
    """Those of ``masters`` (the partitions that are updated) that are copies, not the 16-bit ``weights`` themselves."""
    themselves = {flat.data_ptr() for flat in weights}
    return [master for master in masters if master.data_ptr() not in themselves]
