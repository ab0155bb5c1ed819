"""Directories of models: written whole or not at all, with what lies beside the weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from lisa_ds.errors import CheckpointError


def refuse_taken(out: Path) -> None:
    """Refuse a directory that is neither absent nor empty.

    Raises:
        CheckpointError: It is a file, or holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose a new directory")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory to write to, which becomes ``out`` once all is written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(out)  # over an empty directory, too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_generation_config(source: str, target: Path) -> None:
    """Copy it if there is one: a chat model's stop tokens and sampling settings are often nowhere else."""
    try:
        generation = transformers.GenerationConfig.from_pretrained(source)
    except (OSError, ValueError):  # a model may have none
        return
    generation.save_pretrained(target)


def copy_tokenizer(source: str, target: Path) -> bool:
    """Copy it if there is one; returns whether there is."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):  # a model may have none
        return False
    tokenizer.save_pretrained(target)
    return True
