"""The trainer of ``launch/train.py``: transformers' own, but logits are computed only where there are labels.

Loss and gradients are those of the stock trainer, see :mod:`lisa_ds.integrations.label_logits`.

It can also be stopped and resumed at any step, the last included, and with data-loader workers.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from lisa_ds.integrations.label_logits import LabelledLogits, labelled_positions
from lisa_ds.integrations.order import SeededLengthSampler, keep_order
from lisa_ds.integrations.sharing import count_rows_once, tensor_parallel_size
from lisa_ds.integrations.tally import keep_tally


class LabelLogitsTrainer(Trainer):
    """A ``Trainer`` for causal language models that computes logits of labelled positions only.

    All logits are computed for a model whose loss is not shown to stay equal, a head shared by several ranks, and label
    smoothing. ``labelled_only`` says which applies.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._uses_cache = getattr(model.config, "use_cache", None)
        super().__init__(model, *args, **kwargs)
        count_rows_once(self)
        keep_tally(self)
        keep_order(self)
        stock = (
            self.label_smoother is not None
            or self.compute_loss_func is not None
            or self.args.use_liger_kernel  # it brings a fused head and loss
            or tensor_parallel_size(self.args) > 1  # AutoTP replaces the head, and may the loss
        )
        self._labelled = None if stock else LabelledLogits.of(self.model, counts_items=self.model_accepts_loss_kwargs)
        self.labelled_only = self._labelled is not None
        self.work = Work()
        """What this rank has trained on."""

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
        if self._labelled is None or "shift_labels" in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self._labelled.only(inputs.get("labels")):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """See ``Trainer.save_model``; in the saved config, ``use_cache`` is what it was before training."""
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

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeededLengthSampler(sampler, seed)
        return sampler

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = functools.partial(_outlive_a_signal, loader.worker_init_fn)
        return loader


class Work:
    """Counts what a rank trains on, without waiting for its device."""

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


def _outlive_a_signal(start: Callable[[int], None] | None, worker_id: int) -> None:
    """Have a data loader's worker ignore SIGTERM to all processes of a job: its trainer needs it until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torch has put its own handler over the trainer's
    if start is not None:
        start(worker_id)
