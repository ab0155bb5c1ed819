"""Computes logits at labelled positions only, inside a model's own forward, where loss and gradient are shown to stay.

The head's matrix product and the softmax over the vocabulary are a large part of a small model's step, and in
instruction data most positions are prompt or padding, whose logits are not used. Here the head gets only the hidden
states one position before a label, and transformers' shifted loss gets those labels. All else, such as softcapping or
an additional loss, is the model's code.

Note on what is shown.
    The result is equal if the labels reach the shifted loss unchanged, and if between head and loss each position is
    treated by itself. Names do not show that: XLNet has a plain head, and names the shifted loss, but computes another
    in its forward. So before training the model's own forward runs both ways on a few random hidden states and logits,
    in place of all that is below its head: loss and gradient must be equal. No weight is read, so it takes milliseconds
    for a model of any size, also where ZeRO-3 has partitioned it. A model whose forward fails on these, or gives
    different results, is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutput

IGNORED = -100


def labelled_positions(labels: Tensor) -> Tensor:
    """Which positions need logits: from ``(B, T)`` labels a ``(B, T)`` mask, true one position before each label.

    A batch without any label keeps one position, so that every rank runs head and backward alike.
    """
    kept = _shifted(labels) != IGNORED
    kept[0, 0] |= ~kept.any()
    return kept


class LabelledLogits:
    """Hooks between a model's body and its head, and between its logits and their loss; made by :meth:`of`."""

    def __init__(self, model: PreTrainedModel, head: nn.Linear) -> None:
        self._labels: Tensor | None = None
        self._losses = 0  # how often the shifted loss was computed from chosen logits
        self._hook = head.register_forward_pre_hook(self._choose)
        self._model = model
        model.loss_function = self._loss

    @classmethod
    def of(cls, model: Any, *, counts_items: bool) -> LabelledLogits | None:
        """Install the hooks in ``model``; None, with nothing changed, where its loss is not shown to stay equal.

        Args:
            model: Any causal language model of transformers, also wrapped by PEFT.
            counts_items: Whether its forward will get ``num_items_in_batch``.
        """
        own = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if own is None or own.loss_function is not ForCausalLMLoss:
            return None
        head = own.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return None
        made = cls(own, head)
        if not made._changes_nothing(model, head, {"num_items_in_batch": 5} if counts_items else {}):
            made.let_go()
            return None
        return made

    @contextmanager
    def only(self, labels: Tensor | None) -> Iterator[None]:
        """Inside, a forward with these ``(B, T)`` labels has logits ``(labelled positions, V)``; with None, all."""
        before, self._labels = self._labels, labels
        try:
            yield
        finally:
            self._labels = before

    def _choose(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._labels is None:  # generation, or a caller of the bare model
            return None
        hidden, *others = inputs
        return (hidden[labelled_positions(self._labels)], *others)

    def _loss(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._labels is not None:
            self._losses += 1
            kwargs["shift_labels"] = _shifted(self._labels)[labelled_positions(self._labels)]
        loss: Tensor = ForCausalLMLoss(logits, labels, *args, **kwargs)
        return loss

    def let_go(self) -> None:
        """Remove the hooks; the model is as it was."""
        self._hook.remove()
        del self._model._loss_function

    # ---- before training ------------------------------------------------------------------------------------------

    def _changes_nothing(self, model: Any, head: nn.Linear, kwargs: dict[str, Any]) -> bool:
        """Whether loss and gradient on random logits equal the model's own, in training and in evaluation."""
        draw = torch.Generator().manual_seed(0)
        device = head.weight.device
        hidden = torch.randn(2, 7, head.in_features, generator=draw).to(device)
        labels = torch.randint(0, head.out_features, (2, 7), generator=draw)
        labels[0, :3] = labels[1, 5:] = IGNORED
        batch = {"input_ids": labels.clamp(min=0).to(device), "labels": labels.to(device), **kwargs}
        training = self._model.training
        try:
            return all(self._is_own_loss(model, head, hidden, batch, mode) for mode in (True, False))
        except Exception:  # whatever a forward says to such a body: then nothing is shown
            return False
        finally:
            self._model.training = training

    def _is_own_loss(self, model: Any, head: nn.Linear, hidden: Tensor, batch: dict[str, Any], training: bool) -> bool:
        self._model.training = training  # of the forward above the head; what is below is not run
        found = []
        for labels in (None, batch["labels"]):
            leaf = hidden.clone().requires_grad_()
            before = self._losses
            with torch.enable_grad(), _only_above_head(self._model, head, leaf), self.only(labels):
                output = model(**batch)
            loss = output["loss"] if isinstance(output, dict) else output[0]
            if self._losses - before != (labels is not None):
                return False
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        (own_loss, own_gradient), (loss, gradient) = found
        return bool(
            torch.allclose(loss, own_loss, rtol=1e-5, atol=0.0)
            and torch.allclose(gradient, own_gradient, rtol=1e-2, atol=1e-4 * float(own_gradient.abs().max()))
        )


@dataclass
class _Body(BaseModelOutput):
    """A body's output with hidden states and nothing else, whichever of its fields a model reads."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _only_above_head(model: PreTrainedModel, head: nn.Linear, hidden: Tensor) -> Iterator[None]:
    """Have the models inside ``model`` return ``hidden``, and the head repeat its input, without any weight."""
    columns = torch.arange(head.out_features, device=hidden.device) % head.in_features
    with ExitStack() as undo:
        bodies = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
        for body in bodies:
            undo.enter_context(_replaced_forward(body, lambda *args, **kwargs: _Body(last_hidden_state=hidden)))
        undo.enter_context(_replaced_forward(head, lambda inputs: inputs[..., columns]))
        yield


@contextmanager
def _replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _shifted(labels: Tensor) -> Tensor:
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
