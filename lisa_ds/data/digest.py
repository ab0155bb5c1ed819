"""A digest of tokenised rows, to tell one data set from another, in little time however large it is."""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LOOKED_AT = 1000  # rows


def digest(rows: datasets.Dataset) -> dict[str, Any]:
    """How many ``rows`` there are, and a hash of the length of each and of the tokens and labels of a thousand."""
    lengths = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
    found = hashlib.sha256(np.ascontiguousarray(lengths, dtype="<i8").tobytes())
    looked_at = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _LOOKED_AT)).astype(int))
    table: pa.Table = rows.select(looked_at).with_format("arrow")[:]
    found.update(repr([table["input_ids"].to_pylist(), table["labels"].to_pylist()]).encode())
    return {"rows": len(rows), "digest": found.hexdigest()[:20]}
