"""Generates answers: to one prompt, for a quick look at what a model has learned, or to the turns of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from lisa_ds.errors import ModelError
from lisa_ds.models.positions import most_positions

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 128) -> str:
    """The answer of ``model`` to ``prompt``, by greedy decoding.

    The prompt goes through the tokenizer's chat template; without one it is continued as it stands.

    Returns:
        The new text alone, without special tokens.

    Raises:
        ModelError: The prompt fills the model's table of positions.
    """
    if tokenizer.chat_template:
        return reply(model, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens=max_new_tokens)
    return _continued(model, tokenizer, tokenizer(prompt, return_tensors="pt"), max_new_tokens, 0.0)


def reply(
    model: Any,
    tokenizer: Any,
    turns: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> str:
    """What ``model`` says next in a conversation.

    Args:
        model: In training or evaluation mode; it generates in the latter.
        tokenizer: With a chat template.
        turns: Each with ``role`` and ``content``.
        max_new_tokens: After which it is cut.
        temperature: 0 for greedy decoding; else tokens are drawn from the whole vocabulary by torch's generator.

    Returns:
        The new text alone, without special tokens.

    Raises:
        ModelError: The conversation fills the model's table of positions.
    """
    inputs = tokenizer.apply_chat_template(
        list(turns), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return _continued(model, tokenizer, inputs, max_new_tokens, temperature)


def _continued(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, temperature: float) -> str:
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    most = most_positions(model)
    if most is not None:
        if length >= most:
            raise ModelError(f"a prompt has {length} tokens, and the model has a table of {most} positions; shorten it")
        max_new_tokens = min(max_new_tokens, most - length)
    settings = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _own_settings_aside(model):
            output = model.generate(
                **inputs,
                **settings,
                max_new_tokens=max_new_tokens,
                do_sample=bool(temperature),
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.train(training)
    text: str = tokenizer.decode(output[0, length:], skip_special_tokens=True)
    return text.strip()


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Leave of a checkpoint's settings for generation only what its special tokens are.

    Those for sampling, penalties and the like differ between models that are to be compared by their weights.
    """
    parts = {id(part): part for part in (model, getattr(model, "get_base_model", lambda: model)())}.values()
    before = [part.generation_config for part in parts]
    for part, own in zip(parts, before, strict=True):
        part.generation_config = GenerationConfig(**{key: getattr(own, key, None) for key in _KEPT})
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.generation_config = own
