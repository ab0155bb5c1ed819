"""A model whose loss is its own keeps it: logits at labelled positions alone are taken only where the loss is the same."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from lisa_ds.integrations.label_logits import IGNORED, LabelledLogits
from tests.models import causal_models

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def batch(vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(5, vocabulary, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :6] = labels[1, 12:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def own_and_ours(model: Any) -> tuple[Tensor, Tensor | None]:
    """The model's own loss, and the one with logits of labelled positions alone if it is taken."""
    counts = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    kwargs: dict[str, Any] = {**batch(97), **({"num_items_in_batch": 9} if counts else {})}
    state = torch.get_rng_state()
    labelled = LabelledLogits.of(model.eval(), counts_items=counts)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        own: Tensor = model(**kwargs)[0]
        if labelled is None:
            return own, None
        with labelled.only(kwargs["labels"]):
            return own, model(**kwargs)[0]


# Of the architectures that can be made tiny here, those with another loss, or another order of head and what follows it.
OTHERS = {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart", "mvp", "pegasus"}
OTHERS |= {"plbart", "prophetnet", "rembert", "trocr", "whisper", "xlm", "xlnet"}
SOME = (
    "xlnet",
    "xlm",
    "bart",
    "cpmant",
    "prophetnet",
    "bert-generation",
    "roberta",
    "moshi",
    "cohere",
    "gemma2",
    "granite",
)
SOME += ("mpt", "opt", "mixtral", "minimax", "modernbert-decoder")


@pytest.mark.parametrize("name", SOME)
def test_a_loss_is_the_models_own(name: str) -> None:
    own, ours = own_and_ours(causal_models.build(name))
    assert (ours is None) is (name in OTHERS)
    if ours is not None:
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)


@pytest.mark.nightly
def test_every_architecture_keeps_its_own_loss() -> None:
    compared, others, unmade = [], set(), []
    for name in causal_models.NAMES:
        try:
            own, ours = own_and_ours(causal_models.build(name))
        except causal_models.CannotShrinkError:
            unmade.append(name)
            continue
        if ours is None:
            others.add(name)
            continue
        compared.append(name)
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=0, msg=lambda text, at=name: f"{at}: {text}")
    print(f"{len(compared)} alike, {len(others)} with their own, {len(unmade)} not made here: {unmade}")
    assert others == OTHERS
    assert len(compared) >= 125


def test_without_the_proof_another_loss_would_be_another() -> None:
    """The control: what was computed for these before anything was shown of them."""
    for name in ("xlnet", "bart", "cpmant"):
        model: Any = causal_models.build(name).eval()
        kwargs = batch(97)
        with torch.no_grad():
            own = model(**kwargs)[0]
            shifted = model.loss_function(model(kwargs["input_ids"])[0], kwargs["labels"], vocab_size=97)
        assert abs(float(own - shifted)) > 1e-3, name


class _WithLossOfLogits(LlamaForCausalLM):
    """PaLM's z-loss, beside the usual one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-2 * output.logits.logsumexp(-1).square().mean()
        return output


class _WithLossOfWeights(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-2 * self.model.norm.weight.square().sum()
        return output


class _WithTwoTokens(LlamaForCausalLM):
    """Also predicts the token after the next."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            further = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            output.loss = output.loss + self.loss_function(output.logits, further, vocab_size=97)
        return output


class _Shifting(LlamaForCausalLM):
    """Shifts labels once more than the loss does."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        labels = None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return super().forward(input_ids, labels=labels, **kwargs)


class _Mixing(LlamaForCausalLM):
    """Normalises logits over the positions, too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda head, inputs, output: output - output.mean(-2, keepdim=True))


class _Scaling(LlamaForCausalLM):
    """Scales the gradient of its logits by their positions, and their values by nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(self._scale)

    def _scale(self, head: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient / output.shape[-2])


class _InTraining(LlamaForCausalLM):
    """Has a loss of its own in training only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.training and output.loss is not None:
            output.loss = output.loss + output.logits.square().mean()
        return output


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        (_WithLossOfLogits, False),
        (_WithLossOfWeights, True),
        (_WithTwoTokens, False),
        (_Shifting, False),
        (_Mixing, False),
        (_Scaling, False),
        (_InTraining, False),
    ],
)
def test_a_forward_of_ones_own_is_kept(kind: type[LlamaForCausalLM], taken: bool) -> None:
    model = kind(LlamaConfig(**SIZES))
    own, ours = own_and_ours(model)
    assert (ours is not None) is taken
    if ours is not None:
        torch.testing.assert_close(ours, own)
    else:  # and nothing is left behind
        assert not model.lm_head._forward_pre_hooks
        assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model.model)
    assert "forward" not in vars(model.lm_head)


def test_adapters_change_nothing_of_it() -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    own, ours = own_and_ours(get_peft_model(causal_models.build("llama"), LoraConfig(r=2, task_type="CAUSAL_LM")))
    torch.testing.assert_close(ours, own)
    # Virtual tokens come before the others, and their labels with them.
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert own_and_ours(get_peft_model(causal_models.build("llama"), prompt))[1] is None
