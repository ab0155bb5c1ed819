"""The argument parser of all commands, and the call of the one that was named."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lisa_ds
from lisa_ds.cli import comparing, evaluating, hosts, layers, models, planning, reports, rows, starting, training
from lisa_ds.terminal import Parser

if TYPE_CHECKING:
    from lisa_ds.cli.values import Commands

GROUPS = (starting, rows, planning, hosts, training, comparing, layers, reports, models, evaluating)
"""Modules that hold commands, in the order of the help."""


def call(argv: Sequence[str] | None) -> int | None:
    """Run the command that ``argv`` names; without one, print the help.

    Returns:
        Its exit code, None for 0.

    Raises:
        LisaError: The command raised it, or the command line is wrong.
    """
    parser = build()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments:  # argparse takes none that follow a flag
        arguments.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    code: int | None = arguments.command(arguments)
    return code


def build() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="lisa-ds", description="LISA fine-tuning under DeepSpeed ZeRO-3.")
    parser.add_argument("--version", action="version", version=f"lisa-ds {lisa_ds.__version__}")
    # `deepspeed --no_python lisa-ds check` puts it here.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=lambda _: parser.print_help())
    _add_groups(parser)
    return parser


def _add_groups(parser: Parser) -> Commands:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for group in GROUPS:
        group.add(commands)
    return commands
