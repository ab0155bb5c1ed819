"""Arguments that several commands have: a run file, sizes, counts and times."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING

from lisa_ds.errors import ConfigError

if TYPE_CHECKING:
    from lisa_ds.terminal import Parser

    Commands = argparse._SubParsersAction[Parser]
    """To which a group adds its commands."""


def add_run(parser: Parser, *, help: str = "a YAML or JSON file; --lisa_config FILE says the same") -> None:
    """Give a command the arguments of a run: its file, and keys that override it. :func:`run_file` tells them apart."""
    parser.add_argument("config", nargs="?", metavar="FILE", help=f"the run: {help}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.bf16=true")
    parser.add_argument("--lisa_config", metavar="FILE", help=argparse.SUPPRESS)


def run_file(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The file of a run, None if none is given, and the overrides.

    Raises:
        ConfigError: Two are given.
    """
    words = [*filter(None, [arguments.config]), *arguments.overrides]
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    if arguments.lisa_config is not None:
        files.insert(0, arguments.lisa_config)
    if len(files) > 1:
        raise ConfigError(f"command line: should be key=value with a dotted key, got {files[1]!r} after {files[0]!r}")
    return (files or [None])[0], [word for word in words if word not in files]


def memory(text: str) -> int:
    """Bytes of a device, such as ``80GB``."""
    number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if number is None or not float(number[1]):
        raise argparse.ArgumentTypeError(f"should be such as 80GB, got {text!r}")
    return int(float(number[1]) * 2**30)  # as devices are sold


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number, 1 or more, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Seconds to wait: more than 0, at most an hour."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError(f"should be seconds, more than 0 and at most 3600, got {text!r}")
    return number
