"""Tensors in safetensors files, read by the slice: a rank reads only its own part.

A safetensors file is eight bytes (the length of its header, little-endian), the header (JSON: name to dtype, shape and place)
and the tensors' bytes. It is read, not mapped: pages of a mapping count as the process's own until the file is closed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisa_ds.errors import ModelError

CHUNK_BYTES = 2**24
"""Bytes of the buffer for tensors that cannot be read in place: of another dtype, or on another device."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Position of its first byte in the file."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Fill ``target``, flat and of any dtype and device, with the elements from ``start`` on.

        Raises:
            ModelError: The file has become shorter.
        """
        direct = target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
        step = max(1, target.numel() if direct else CHUNK_BYTES // self.dtype.itemsize)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            for first in range(0, target.numel(), step):
                part = target[first : first + step]
                chunk = part if direct else torch.empty(part.numel(), dtype=self.dtype)
                self._fill(file.fileno(), chunk.view(torch.uint8).numpy().data)
                if not direct:
                    part.copy_(chunk)

    def read(self) -> Tensor:
        """All of it, in fp32.

        Raises:
            ModelError: The file has become shorter.
        """
        flat = torch.empty(self.numel, dtype=torch.float32)
        self.read_into(flat)
        return flat.view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes as they are in the file, in order.

        Raises:
            ModelError: The file has become shorter.
        """
        with self.path.open("rb") as source:
            source.seek(self.offset)
            left = self.numel * self.dtype.itemsize
            while left:
                chunk = source.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise ModelError(f"{self.path}: ends within {self.name}; it was replaced or cut while it was read")
                yield chunk
                left -= len(chunk)

    def _fill(self, file: int, place: memoryview) -> None:
        while place:
            count = os.readv(file, [place])  # Linux gives 2 GiB at most
            if count == 0:
                raise ModelError(f"{self.path}: ends within {self.name}; it was replaced or cut while it was read")
            place = place[count:]


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is computed when it is written, and not before."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]
    """Gives it in any dtype; it is rounded to ``dtype`` once."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes."""
        found = self.compute()
        assert tuple(found.shape) == self.shape, (found.shape, self.shape)
        yield found.to(self.dtype).contiguous().flatten().view(torch.uint8).numpy().data


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; only its header is read.

    Raises:
        ModelError: It is truncated, no safetensors file, or a tensor has a dtype that no weight is trained in.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{path}: is truncated or no safetensors file ({size} bytes); copy or download it again")
        try:
            header = json.loads(file.read(length))
            places = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in places.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError(f"{path}: its header is damaged; copy or download it again") from None
    needed = 8 + length + max(ends, default=0)
    if needed > size:
        raise ModelError(f"{path}: is truncated: {size} bytes of {needed}; copy or download it again")
    return {name: _stored(path, name, entry, 8 + length) for name, entry in places.items()}


def write(path: Path, tensors: Mapping[str, StoredTensor | ComputedTensor]) -> None:
    """Write a safetensors file, one tensor after another: those of other files byte by byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for chunk in tensor.chunks():
                file.write(chunk)


def digest(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes; how they are spread over files does not matter."""
    found = hashlib.sha256()
    for name, stored in sorted(tensors.items()):
        found.update(f"{name}\0{_NAMES[stored.dtype]}\0{list(stored.shape)}\0".encode())
        for chunk in stored.chunks():
            found.update(chunk)
    return found.hexdigest()


def _stored(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ModelError(
            f"{path}: {name} is stored as {entry['dtype']}, in which no weight is trained; convert it first"
        )
    first, end = entry["data_offsets"]
    stored = StoredTensor(path, name, dtype, tuple(entry["shape"]), data + first)
    if end - first != stored.numel * dtype.itemsize:
        raise ModelError(f"{path}: its header is damaged at {name}; copy or download it again")
    return stored
