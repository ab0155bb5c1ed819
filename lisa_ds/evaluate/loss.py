"""The held-out loss of a model: the mean over all labelled tokens, or over all rows of a classification.

A trainer's ``eval_loss`` is a mean over batches of means over the labelled tokens of each, so that it depends on batch size,
number of ranks and order of the rows. Here the losses of all tokens are added up and divided once.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from lisa_ds import data
from lisa_ds.config import RunConfig
from lisa_ds.errors import DataError
from lisa_ds.evaluate.opened import Opened
from lisa_ds.integrations.label_logits import LabelledLogits, labelled_positions
from lisa_ds.train import fit

_AT_ONCE = 256  # positions whose logits are turned into fp32 together: 128 MB at a vocabulary of 128k


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """What was measured on held-out rows."""

    loss: float
    """Nats, the mean over ``tokens``; of a classification, over ``rows``."""

    rows: int
    tokens: int
    """Tokens with a label; 0 for a classification."""

    accuracy: float | None = None
    """Share of rows with the right class; None for a language model."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where no float holds it."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def held_out_rows(opened: Opened) -> Any:
    """The held-out rows as tokens, as the run has them.

    Raises:
        DataError: There are none, they cannot be read, or have other classes than the model.
        ModelError: A token has no row in the embedding.
        ConfigError: A row is longer than the model's table of positions.
    """
    config, name = opened.config, opened.subject.name
    classes = _class_names(opened.shape.config, config) if opened.subject.adapter is None else None  # the base's own
    rows = data.load_held_out(config.data, opened.tokenizer, task=config.model.task, labels=classes)
    if rows is None:
        raise DataError(
            f"{config.where('data')}: holds out no rows, so there is nothing to measure {name} on; set data.eval_path, data.eval_split "
            "or data.eval_fraction, or name the file of its run, --lisa_config FILE"
        )
    fit.check_rows(config, opened.shape, opened.tokenizer, rows)
    found, known = data.num_labels(rows) or 0, opened.shape.config.num_labels
    if config.model.task != "causal_lm" and found > known:
        raise DataError(f"{name}: tells {known} classes apart, and the rows have {found}")
    if opened.subject.adapter is not None and found < known and data.label_names(rows):
        raise DataError(
            f"{name}: tells {known} classes apart, and the rows name {found}; an adapter does not hold their names, so that of each is "
            "not known: set data.path to the rows it was trained on"
        )
    return rows


def _class_names(shape: Any, config: RunConfig) -> tuple[str, ...] | None:
    """The names of a classifier's classes in its own order, if it knows them."""
    names = [name for i, name in sorted(shape.id2label.items()) if name != f"LABEL_{i}"]
    return tuple(names) if names and config.model.task != "causal_lm" else None


def measure(model: Any, rows: Any, collate: Callable[[list[Any]], Any], *, task: str, batch_size: int) -> HeldOutLoss:
    """Measure ``model`` on ``rows``; in a process group, each rank takes a share of them, and all have the result.

    Losses of tokens are computed in fp32 and added up in fp64, whatever the model computes in.

    Args:
        model: In evaluation mode.
        rows: Of :func:`~lisa_ds.data.load_held_out`.
        collate: Of :func:`~lisa_ds.data.collator`.
        task: ``causal_lm`` or ``sequence_classification``.
        batch_size: Rows that a rank computes at once.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    lengths = [len(ids) for ids in rows["input_ids"]]
    mine = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))[rank::ranks]  # like lengths side by side
    score = _classified if task == "sequence_classification" else _of_tokens
    found: list[tuple[float, int]] = []
    with torch.no_grad(), _without_cache(model.config), _labelled_only(model, task) as only:
        for start in tqdm(range(0, len(mine), batch_size), "measuring", disable=None if rank == 0 else True):
            chosen = [rows[i] for i in mine[start : start + batch_size]]
            batch = {name: values.to(model.device) for name, values in collate(chosen).items()}
            found += score(model, batch, batch.pop("labels"), only)
    if ranks > 1:
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, found)
        found = [pair for part in gathered for pair in part]
    total, count = math.fsum(loss for loss, _ in found), sum(number for _, number in found)
    if task == "sequence_classification":
        return HeldOutLoss(loss=total / len(found), rows=len(found), tokens=0, accuracy=count / len(found))
    return HeldOutLoss(loss=total / count, rows=len(found), tokens=count)


def _of_tokens(model: Any, batch: dict[str, Tensor], labels: Tensor, only: Any) -> list[tuple[float, int]]:
    """Of each row, the sum of the losses of its labelled tokens and their number."""
    places = labelled_positions(labels)
    with only(labels):
        logits = model(**batch).logits
    if logits.dim() == 3:
        logits = logits[places]
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=data.IGNORED)[places]
    losses = torch.cat(
        [
            cross_entropy(logits[i : i + _AT_ONCE].float(), targets[i : i + _AT_ONCE], reduction="none")
            for i in range(0, len(targets), _AT_ONCE)
        ]
    )
    of_row = places.nonzero()[:, 0]
    sums = losses.new_zeros(len(labels), dtype=torch.float64).index_add_(0, of_row, losses.double())
    counts = of_row.new_zeros(len(labels)).index_add_(0, of_row, (targets != data.IGNORED).long())
    return list(zip(sums.tolist(), counts.tolist(), strict=True))


def _classified(model: Any, batch: dict[str, Tensor], labels: Tensor, only: Any) -> list[tuple[float, int]]:
    """Of each row its loss, and 1 if its class is the model's likeliest."""
    logits = model(**batch).logits.float()
    losses = cross_entropy(logits, labels, reduction="none")
    return list(zip(losses.tolist(), (logits.argmax(-1) == labels).int().tolist(), strict=True))


@contextlib.contextmanager
def _labelled_only(model: Any, task: str) -> Iterator[Any]:
    """What makes a forward compute logits at labelled positions alone, where that is shown to change nothing."""
    own = LabelledLogits.of(model, counts_items=False) if task == "causal_lm" else None
    if own is None:
        yield lambda labels: contextlib.nullcontext()
        return
    try:
        yield own.only
    finally:
        own.let_go()


@contextlib.contextmanager
def _without_cache(config: Any) -> Iterator[None]:
    """Keep no keys and values for generation; some models take no argument that says so."""
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextlib.contextmanager
def process_group() -> Iterator[int]:
    """A process group of the ranks that a launcher has started, if there are several; yields this process's rank."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or dist.is_initialized():
        yield dist.get_rank() if dist.is_initialized() else 0
        return
    dist.init_process_group("gloo")  # only losses of rows are exchanged
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
