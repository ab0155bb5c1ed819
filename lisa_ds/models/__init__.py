"""Models and tokenizers by name: built in, in a directory, or on the Hugging Face hub."""

from __future__ import annotations

from lisa_ds.models.generate import answer as answer
from lisa_ds.models.generate import reply as reply
from lisa_ds.models.load import check_weights as check_weights
from lisa_ds.models.load import fitting_skeleton as fitting_skeleton
from lisa_ds.models.load import load_model as load_model
from lisa_ds.models.load import load_tokenizer as load_tokenizer
from lisa_ds.models.load import model_config as model_config
from lisa_ds.models.load import resolve as resolve
from lisa_ds.models.load import skeleton as skeleton

__all__ = [
    "answer",
    "check_weights",
    "fitting_skeleton",
    "load_model",
    "load_tokenizer",
    "model_config",
    "reply",
    "resolve",
    "skeleton",
]
