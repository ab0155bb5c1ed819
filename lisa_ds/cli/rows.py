"""The command `preview`: shows rows as they will be trained on, before a run."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from lisa_ds.cli import values
from lisa_ds.config import load_config
from lisa_ds.errors import ConfigError

_LEARNED = "\x1b[32;4m"  # green, underlined
_PLAIN = "\x1b[0m"


def add(commands: values.Commands) -> None:
    """Declare `preview`."""
    preview = commands.add_parser("preview", help="show rows of a run's data, what is learned in brackets")
    values.add_run(preview)
    preview.add_argument("--rows", type=values.count, default=3, metavar="N", help="of each set; default: 3")
    preview.set_defaults(command=_preview)


def _preview(arguments: argparse.Namespace) -> None:
    file, overrides = values.run_file(arguments)
    if file is None:
        raise ConfigError("preview: name the FILE of a run")
    config = load_config(file, overrides)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rows hold what a terminal may not know
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)  # what was cut and left out

    from lisa_ds import data
    from lisa_ds.models import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    sets = data.load_dataset(config.data, tokenizer, task=config.model.task)
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, rows in zip(("training data", "held-out data"), sets, strict=True):
        if rows is not None:
            print(f"{name}: {data.describe(rows)}")
            for line in _shown(rows.select(range(min(arguments.rows, len(rows)))), tokenizer, in_colour=in_colour):
                print(line)


def _shown(rows: Any, tokenizer: Any, *, in_colour: bool) -> Iterator[str]:
    from lisa_ds import data

    names = data.label_names(rows)
    for number, row in enumerate(rows, start=1):
        tokens = f"{len(row['input_ids']):,} tokens"
        if isinstance(row["labels"], list):
            learned = sum(label != data.IGNORED for label in row["labels"])
            yield f"\n--- row {number}: {tokens}, {learned:,} with loss ---"
            text = _printable(data.preview(row, tokenizer))
        else:
            yield f"\n--- row {number}: {tokens}, label {names[row['labels']] if names else row['labels']} ---"
            text = _printable(tokenizer.decode(row["input_ids"]))
        yield text.replace("⟦", f"{_LEARNED}⟦").replace("⟧", f"⟧{_PLAIN}") if in_colour else text
    yield ""


def _printable(text: str) -> str:
    """Control characters as Python writes them: a row must not steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
