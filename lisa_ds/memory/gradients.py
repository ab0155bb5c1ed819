"""Where the gradients of parameters are in backward: kept in place, or reduced out of a bucket as ZeRO-3 or ZeRO-2 does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lisa_ds.memory.ledger import Ledger


@dataclass(frozen=True)
class GradientSettings:
    """How gradients are reduced, and what is allocated for it within a step."""

    bucket_size: int = 0
    """Elements of the reduce bucket."""

    kept_width: int = 0
    """Bytes of an element of gradients that stay in place until the step; 0 where they are reduced out of a bucket."""

    copies: bool = True
    """Whether a bucket is reduced through a copy of it in which each rank's part is contiguous, as in ZeRO-3."""

    bucket_bytes: int = 0
    """Bytes of a bucket that is allocated at the first gradient, as in ZeRO-2; 0 where it is there always."""

    reduced_bytes: int = 0
    """Bytes of the reduced gradients, where they are allocated when the first bucket has been reduced; 0 where they are there always."""


@dataclass
class Gradients:
    """Books gradients in a ledger, in the order in which backward makes them.

    Args:
        numels: Elements of each parameter.
        tied: The parameters that embeddings and head share.
        world_size: Ranks that the reduced gradients are partitioned over.
        width: Bytes of an element.
        settings: How they are reduced.
        ledger: Where bytes are booked.
    """

    numels: Mapping[int, int]
    tied: tuple[int, ...]
    world_size: int
    width: int
    settings: GradientSettings
    ledger: Ledger
    _bucket: list[int] = field(default_factory=list)
    _begun: bool = False
    _reduced: bool = False

    def made(self, number: int, *, in_head: bool) -> None:
        """A parameter has got its gradient, or a share of it."""
        ledger, settings = self.ledger, self.settings
        if settings.kept_width:
            size = self.numels[number] * settings.kept_width
            name = f"gradients/{number}"
            (ledger.briefly if name in ledger.sizes else ledger.add)(name, size)
            return
        name = f"gradients in flight/{number}"
        size = self.numels[number] * self.width
        if in_head and number in self.tied:
            ledger.add(name, size)  # waits for the embeddings' share
            return
        (ledger.briefly if name in ledger.sizes else ledger.add)(name, size)
        if not self._begun:
            self._begun = True
            ledger.add("buckets", settings.bucket_bytes)
        elements = sum(self.numels[other] for other in self._bucket)
        if self._bucket and elements + self.numels[number] > settings.bucket_size:
            self._reduce()
            elements = 0
        self._bucket.append(number)
        if elements + self.numels[number] <= settings.bucket_size:
            ledger.drop(name)  # copied into the bucket

    def finish(self) -> None:
        """Backward has ended: reduce what is left."""
        self._reduce()
        self.ledger.drop("buckets")

    def _reduce(self) -> None:
        if not self._bucket:
            return
        if self.settings.copies:
            world = self.world_size
            padded = sum(-(-self.numels[number] // world) * world for number in self._bucket)
            alone = len(self._bucket) == 1 and self.numels[self._bucket[0]] % world == 0
            self.ledger.briefly("gradients in flight/reduce", 0 if alone else padded * self.width)
        if not self._reduced:
            self._reduced = True
            self.ledger.add("gradients", self.settings.reduced_bytes)
        for number in self._bucket:
            self.ledger.drop(f"gradients in flight/{number}")
        self._bucket.clear()
