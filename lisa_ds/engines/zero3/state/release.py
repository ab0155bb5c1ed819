"""Policies for the optimizer state of a unit that stops training."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Release(Protocol):
    """A policy. State is passed by sub-group: the part of a unit in one parameter group.

    Each call is made between optimizer steps, on all ranks alike.
    """

    def leaves(self, sub_group: int, master: Tensor, moments: dict[str, Any]) -> None:
        """Called with the state of a sub-group that stops training, the last reference to it: copy what is to be kept.

        Args:
            sub_group: Which one, in the whole layout.
            master: Its fp32 partition on this rank, ``(numel,)``; the 16-bit weights themselves where there is no master copy.
            moments: The optimizer's state for it, by torch's names; empty before the first step.
        """

    def returns(self, sub_group: int, master: Tensor) -> dict[str, Any]:
        """Return the kept state of a sub-group that begins to train.

        Args:
            sub_group: Which one.
            master: Its new fp32 partition, filled from the 16-bit weights; a kept one is copied into it.

        Returns:
            The moments it continues with; empty if it begins without.
        """

    def forget(self) -> None:
        """Drop everything kept: the weights are about to be replaced."""

    def parked_bytes(self) -> dict[str, int]:
        """Bytes kept on this rank: ``parked_host`` and ``parked_nvme``."""


class Drop:
    """LISA as published: state is dropped, and a unit that is drawn again begins without moments."""

    def leaves(self, sub_group: int, master: Tensor, moments: dict[str, Any]) -> None:
        """Keep nothing; see :class:`Release`."""

    def returns(self, sub_group: int, master: Tensor) -> dict[str, Any]:
        """Give nothing back; see :class:`Release`."""
        return {}

    def forget(self) -> None:
        """There is nothing to forget; see :class:`Release`."""

    def parked_bytes(self) -> dict[str, int]:
        """None of either kind; see :class:`Release`."""
        return {"parked_host": 0, "parked_nvme": 0}
