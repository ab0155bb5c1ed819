"""Data sets: turns rows of any common form into tokens, with loss on the answers only."""

from __future__ import annotations

from lisa_ds.data.collate import collator as collator
from lisa_ds.data.digest import digest as digest
from lisa_ds.data.prepare import describe as describe
from lisa_ds.data.prepare import label_names as label_names
from lisa_ds.data.prepare import load_dataset as load_dataset
from lisa_ds.data.prepare import load_held_out as load_held_out
from lisa_ds.data.prepare import num_labels as num_labels
from lisa_ds.data.prepare import preview as preview
from lisa_ds.data.templates import set_chat_template as set_chat_template
from lisa_ds.data.tokenise import IGNORED as IGNORED

__all__ = [
    "IGNORED",
    "collator",
    "describe",
    "digest",
    "label_names",
    "load_dataset",
    "load_held_out",
    "num_labels",
    "preview",
    "set_chat_template",
]
