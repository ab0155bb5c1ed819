"""``lisa-ds``: a run before, during and after it, as commands.

A module holds a group of commands. Its ``add`` declares them, and it is entered in :mod:`lisa_ds.cli.parser`; what they
need is imported when they run: ``lisa-ds --version`` on a login node loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence

from lisa_ds import terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        An exit code, as :func:`lisa_ds.terminal.run` has them.
    """

    def command() -> int | None:
        from lisa_ds.cli import parser  # here, where Ctrl-C is heard already

        return parser.call(argv)

    return terminal.run(command)
