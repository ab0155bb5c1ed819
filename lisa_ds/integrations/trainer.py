"""The trainer of ``launch/train.py``: stock, but for logits that exist only where there are labels.

The head's matrix product and the softmax over the vocabulary are a large part of a small model's step, and in instruction
data most positions are prompt or padding, whose logits nobody reads. Here the head sees the hidden states of the labelled
positions alone. Loss and gradients are those of the stock trainer, computed by transformers' own loss function.

It can also be stopped and continued anywhere: at the last step, and with workers that load data.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from lisa_ds.integrations.sharing import count_rows_once, tensor_parallel_size

IGNORED = -100


class LabelLogitsTrainer(Trainer):
    """A ``Trainer`` for causal language models that computes logits of labelled positions only.

    Models without a plain output head, or with one shared by several ranks, and label smoothing, take the stock way.
    ``labelled_only`` tells which it is.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._uses_cache = getattr(model.config, "use_cache", None)
        super().__init__(model, *args, **kwargs)
        count_rows_once(self)
        head = _plain_head(self.model)
        self.labelled_only = (
            head is not None
            and self.label_smoother is None
            and kwargs.get("compute_loss_func") is None
            and not self.args.use_liger_kernel  # it brings a fused head and loss
            and tensor_parallel_size(self.args) == 1  # AutoTP replaces the head, and may the loss
        )
        self.work = Work()
        """What this rank has trained on."""
        self._kept: Tensor | None = None
        if head is not None and self.labelled_only:
            head.register_forward_pre_hook(self._keep_labelled)
            # With a loss function of its own, Trainer withholds the labels from the model and keeps its own scaling.
            self.compute_loss_func = _labelled_loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """See ``Trainer.training_step``; counts tokens."""
        self.work.add(inputs, labelled_only=self.labelled_only)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    @property
    def tokens(self) -> Tensor | float:
        """Tokens this rank has trained on, padding not counted."""
        return self.work.counts[0]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer.compute_loss``."""
        before = self._kept
        self._kept = labelled_positions(inputs["labels"]) if self.labelled_only and "labels" in inputs else None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._kept = before

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """See ``Trainer.save_model``; a model that is saved generates with a cache again, which training has no use for."""
        config = self.model.config
        while_training = getattr(config, "use_cache", None)
        if self._uses_cache is not None:
            config.use_cache = self._uses_cache
        try:
            super().save_model(*args, **kwargs)
        finally:
            if self._uses_cache is not None:
                config.use_cache = while_training

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Transformers would look at max_steps only after another step, when a run continues from its last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = functools.partial(_outlive_a_signal, loader.worker_init_fn)
        return loader

    def _keep_labelled(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._kept is None:  # generation, or a caller of the bare model
            return None
        hidden, *others = inputs
        return (hidden[self._kept], *others)


class Work:
    """Counts what a rank trains on, without a wait for its device."""

    def __init__(self) -> None:
        self.counts: Tensor = torch.zeros(5, dtype=torch.float64)
        """Tokens, padding not counted; pairs of tokens of a row (a row of t has t * t); positions with logits; and all
        positions and pairs of positions, padding included."""

    def add(self, inputs: dict[str, Any], *, labelled_only: bool) -> None:
        """Count a batch: ``input_ids``, and if it has them ``attention_mask`` and ``labels``, all ``(B, T)``.

        Args:
            inputs: The batch.
            labelled_only: Whether logits are computed where there are labels only.
        """
        ids = inputs["input_ids"]
        rows, length = ids.shape
        mask = inputs.get("attention_mask")
        lengths = ids.new_full((rows,), length) if mask is None or mask.dim() != 2 else mask.sum(-1)
        labels = inputs.get("labels") if labelled_only else None
        logits = ids.new_full((), rows * length) if labels is None else labelled_positions(labels).sum()
        seen = torch.stack([lengths.sum(), lengths.square().sum(), logits]).double()
        whole = [seen.new_full((1,), size) for size in (rows * length, rows * length * length)]  # a copy would wait
        self.counts = self.counts.to(seen.device) + torch.cat([seen, *whole])


class Clock(TrainerCallback):
    """Adds up the time of the training steps; evaluations and checkpoints are not in it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop; the trainer has read the loss by now, so a GPU has caught up."""
        self.seconds += time.perf_counter() - self._start


def labelled_positions(labels: Tensor) -> Tensor:
    """Where a logit is needed: ``(B, T)`` labels to a ``(B, T)`` mask, true at the position before each label.

    A batch without any label keeps one position, so that every rank runs head and backward alike.
    """
    kept = _shifted(labels) != IGNORED
    kept[0, 0] |= ~kept.any()
    return kept


def _outlive_a_signal(start: Callable[[int], None] | None, worker_id: int) -> None:
    """Have a data loader's worker go on when every process of a job is signalled, as its trainer does until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torch has put its own handler over the trainer's
    if start is not None:
        start(worker_id)


def _labelled_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    kept = labelled_positions(labels)
    loss: Tensor = ForCausalLMLoss(
        logits=logits,
        labels=None,
        vocab_size=logits.shape[-1],
        num_items_in_batch=num_items_in_batch,
        shift_labels=_shifted(labels)[kept],
    )
    return loss


def _shifted(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _plain_head(model: Any) -> nn.Module | None:
    """The module whose output is the logits, if nothing but element-wise functions comes between it and the loss."""
    config = getattr(model, "config", None)
    if getattr(model, "loss_function", None) is not ForCausalLMLoss or getattr(config, "is_encoder_decoder", False):
        return None
    if getattr(config, "output_router_logits", False):  # the model adds a loss of its own where it is given labels
        return None
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None
