"""Bytes of tensors, counted from their storages."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    storages = {}
    for tensor in tensors:
        if torch.is_tensor(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), str(storage.device)] = storage.nbytes()
    return sum(storages.values())
