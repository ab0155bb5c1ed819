"""Rademacher vectors (random signs, one for each weight), any part of which any rank can generate by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from lisa_ds.config.formats import SCORING_CHUNK as CHUNK


def rademacher(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Elements from ``start`` on of the Rademacher vector of ``key``: ``(count,)``, int64, each 1 or -1.

    Each is a hash of its index, the finaliser of MurmurHash3 twice: any device can generate any part.
    """
    signs = torch.arange(start, start + count, device=device)
    _mix(signs)
    _mix(signs.bitwise_xor_(key))
    return signs.bitwise_and_(1).mul_(2).sub_(1)


def _mix(values: Tensor) -> None:
    """Hash 32-bit numbers, kept in int64 so that a shift brings in zeros, in place."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values.bitwise_xor_(values >> shift).mul_(factor).bitwise_and_(0xFFFFFFFF)
    values.bitwise_xor_(values >> 16)


def along(values: Tensor, key: int, start: int) -> Tensor:
    """The inner product, ``()`` in fp64, of ``values`` with the part of ``key``'s vector that begins at ``start``."""
    signs = rademacher(key, start, values.numel(), values.device)
    return values.double().mul_(signs).sum()


def key_of(seed: int, number: int) -> int:
    """The 32-bit key of the Rademacher vector of parameter ``number``, its place in the model."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest(), "little")


def mover(amount: float, key: int) -> Callable[[Tensor, int], None]:
    """A function that adds ``amount`` times the vector of ``key`` to weights in place.

    It takes a flat part of the weights, and the index of its first element.
    """

    def move(weights: Tensor, first: int) -> None:
        for start in range(0, weights.numel(), CHUNK):
            _move(weights[start : start + CHUNK], key, first + start, amount)

    return move


def _move(weights: Tensor, key: int, start: int, amount: float) -> None:
    signs = rademacher(key, start, weights.numel(), weights.device)
    weights.copy_(torch.add(weights.float(), signs, alpha=amount))
