"""The order of a trainer's rows: fixed by a seed and a position, so that a resumed run goes on with the next row."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from lisa_ds.config.row_order import differing
from lisa_ds.integrations.sharing import tensor_parallel_size


def order_of(args: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides which rows are in which step, under the names of a run file's keys.

    Args:
        args: The trainer's arguments.
        rows: A fingerprint of its data set; under ``rows`` the number of rows.
    """
    loading = args.accelerator_config
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "ranks": args.world_size // tensor_parallel_size(args),
        "train_sampling_strategy": str(getattr(args, "train_sampling_strategy", "random")),
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "dataloader_drop_last": args.dataloader_drop_last,
        "accelerator_config": {
            key: getattr(loading, key) for key in ("split_batches", "even_batches", "use_seedable_sampler")
        },
        "data": dict(rows),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two orders, in words; none if the same rows are in the same steps.

    What only one of them has is no difference: another release has saved it.
    """
    changed = [key for key in differing(saved, now) if key in saved and key in now]
    told = [
        f"training.{key} {saved[key]!r}, and now it is {now[key]!r}" for key in changed if key not in ("data", "ranks")
    ]
    if "ranks" in changed:
        told.append(f"{saved['ranks']} ranks with rows of their own, and now there are {now['ranks']}")
    if "data" in changed:
        then, count = saved["data"]["rows"], now["data"]["rows"]
        told.append(
            f"{then:,} training rows, and now there are {count:,}"
            if then != count
            else f"other training rows than now, though there are {count:,} in both"
        )
    return told


class RowOrder(TrainerCallback, ExportableState):
    """Saves the order in every checkpoint's ``trainer_state.json``.

    Args:
        order: From :func:`order_of`.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order

    def state(self) -> dict[str, Any]:
        """What the trainer saves."""
        return {"args": {"order": self.order}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the order saved also by a run that resumes from a checkpoint without it."""
        state.stateful_callbacks[type(self).__name__] = self.state()


class SeededLengthSampler(LengthGroupedSampler):
    """Rows grouped by length, in an order that depends on a seed and the epoch alone.

    Transformers' own sampler draws from the process's generator, whose state evaluation and dropout change.

    Args:
        sampler: Transformers' sampler.
        seed: Of the run.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())
        self._seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The rows of :attr:`epoch`."""
        self.generator.manual_seed(self._seed + self.epoch)
        return iter(super().__iter__())


def enter_epoch(loader: Any, epoch: int) -> None:
    """Have the sampler of a prepared data loader draw the order of ``epoch``.

    Accelerate does so, but not where batches are split between ranks and the first of them are skipped: a run resumed
    in its second epoch or later would get the order of the first.
    """
    at = getattr(loader, "batch_sampler", None)
    while at is not None:
        for one in (at, getattr(at, "sampler", None)):
            if one is not None and hasattr(one, "set_epoch"):
                one.set_epoch(epoch)
        at = getattr(at, "batch_sampler", None)


def keep_order(trainer: Any) -> None:
    """Have ``trainer`` go on, when it is resumed, with the rows that come next: see :func:`enter_epoch`."""
    stock = getattr(trainer, "_run_epoch", None)
    if stock is None:  # earlier transformers have no place for it
        return

    @functools.wraps(stock)
    def run_epoch(*args: Any, **kwargs: Any) -> None:
        enter_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        stock(*args, **kwargs)

    trainer._run_epoch = run_epoch
