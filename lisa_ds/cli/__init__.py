"""``lisa-ds``, the command line: plan, check, train, inspect and export a run.

Each module holds a group of commands. Its ``add`` declares them, and :mod:`lisa_ds.cli.parser` lists it. What a command
needs is imported when it runs: ``lisa-ds --version`` on a login node loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence

from lisa_ds import terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code, see :func:`lisa_ds.terminal.run`.
    """

    def command() -> int | None:
        from lisa_ds.cli import parser  # here, where Ctrl-C is heard already

        return parser.call(argv)

    return terminal.run(command)
