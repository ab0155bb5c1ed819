"""Collates rows of tokens into a padded batch."""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from lisa_ds.data.tokenise import IGNORED


def collator(tokenizer: Any, *, pad_to_multiple_of: int | None = None, task: str = "causal_lm") -> Any:
    """A collator that pads the rows of :func:`lisa_ds.data.load_dataset` to the longest of a batch.

    Labels are padded with -100, whatever the padding token is: with SmolLM2 it is the token that ends an answer,
    and a collator that masked it would teach the model never to stop.

    Args:
        tokenizer: With a padding token.
        pad_to_multiple_of: Round lengths up, for kernels that are faster at multiples of 8 or 64.
        task: ``causal_lm`` or ``sequence_classification``.
    """
    if task == "sequence_classification":
        return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=pad_to_multiple_of)
