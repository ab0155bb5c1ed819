"""What all commands share: spelling of options, one-line error messages, exit codes, and clean ends on Ctrl-C."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from lisa_ds.errors import ConfigError, LisaError

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells count."""

READER_GONE = 128 + signal.SIGPIPE
"""Exit code of a command whose output is no longer read (a closed pipe), such as in ``| head``."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose options may be written with ``-`` or with ``_``, and whose mistakes are one line.

    Args:
        default_command: Of its commands the one that is meant where a first word names none.
        **settings: See argparse.

    Example:
        >>> parser = Parser(prog="example")
        >>> _ = parser.add_argument("--world-size")
        >>> parser.parse_args(["--world_size", "8"]).world_size
        '8'
    """

    def __init__(self, *, default_command: str | None = None, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        self._default_command = default_command

    def error(self, message: str) -> NoReturn:
        """See argparse.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{' '.join(message.split())}; see `{self.prog} --help`")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """See argparse."""
        words = list(sys.argv[1:] if args is None else args)
        if self._default_command and words and words[0] not in (*self._commands(), "-h", "--help"):
            words.insert(0, self._default_command)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._as_declared, words[:end]), *words[end:]], namespace)

    def _commands(self) -> list[str]:
        return [name for action in self._actions if isinstance(action.choices, dict) for name in action.choices]

    def _as_declared(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        same = (known for known in self._option_string_actions if _plain(known) == _plain(name))
        return next(same, name) + equals + value


def _plain(option: str) -> str:
    return option.replace("_", "-")


def run(command: Callable[[], int | None], prefix: str = "lisa-ds: ") -> int:
    """Run ``command`` and end as a Unix tool does.

    Args:
        command: The command; returns an exit code, None for 0.
        prefix: Put before an error message.

    Returns:
        What ``command`` returns; 2 after an error that is the user's to put right; :data:`INTERRUPTED` after Ctrl-C,
        :data:`READER_GONE` if the reader of the output is gone. Anything else is raised.
    """
    # Imported by PEFT wherever it is installed, it warns of kernels for 4-bit weights that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for stream in _streams():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no such letter is no reason to fail
    try:
        code = _spoken(command, prefix)
        for stream in _streams():
            stream.flush()  # not left to the end of the interpreter, which would complain of a reader that has gone
        return code
    except BrokenPipeError:
        if not any(map(_is_read_no_more, _streams())):
            raise
        _forget_what_is_unwritten()
        return READER_GONE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _forget_what_is_unwritten()
        print(f"{prefix}error: cannot write {error.filename or 'all output'}: {error.strerror}", file=sys.stderr)
        return LisaError.exit_code


def _spoken(command: Callable[[], int | None], prefix: str) -> int:
    try:
        return command() or 0
    except LisaError as error:
        print(f"{prefix}error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{prefix}interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:  # argparse, after --help and --version
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: closed by the caller


def _is_read_no_more(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream, 0)
    except (OSError, ValueError):  # no file at all
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _forget_what_is_unwritten() -> None:
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
