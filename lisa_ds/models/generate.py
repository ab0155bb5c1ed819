"""Generates one answer to one prompt, for a quick look at what a model has learned."""

from __future__ import annotations

from typing import Any

import torch


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 128) -> str:
    """The answer of ``model`` to ``prompt``, by greedy decoding.

    The prompt goes through the tokenizer's chat template; without one it is continued as it stands.

    Returns:
        The new text alone, without special tokens.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,  # a checkpoint's sampling settings would only make generate warn
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.train(training)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
