"""How commands end when nobody reads them, when the disk is full, and upon Ctrl-C; and both spellings of every option."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lisa_ds import terminal
from lisa_ds.cli import main, parser
from lisa_ds.errors import ConfigError
from lisa_ds.train import command

LISA_DS = [sys.executable, "-m", "lisa_ds.cli"]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's, by name."""
    found: dict[str, argparse.ArgumentParser] = {"launch/train.py": command.build_parser()}

    def walk(one: argparse.ArgumentParser) -> None:
        found[one.prog] = one
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    walk(inner)

    walk(parser.build())
    return found


OPTIONS = [
    (name, option)
    for name, one in parsers().items()
    for option in one._option_string_actions
    if option.startswith("--") and ("-" in option[2:] or "_" in option)
]


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_has_both_spellings(name: str, option: str) -> None:
    one = parsers()[name]
    action = one._option_string_actions[option]
    value = [] if action.nargs == 0 else ["3GB" if "memory" in option else "3"]
    needed = [word for other in one._actions if other.required for word in (*other.option_strings[:1], "1")]
    told = []
    for written in (option, "--" + option[2:].replace("-", "_"), "--" + option[2:].replace("_", "-")):
        for words in ([written, *value], ["=".join([written, *value])]):
            told.append(getattr(one.parse_known_args([*needed, *words])[0], action.dest))
    assert all(one == told[0] for one in told[1:])
    assert told[0] != action.default


def test_there_are_options_to_spell() -> None:
    spelled = {option for _, option in OPTIONS}
    assert {"--world-size", "--gpu-memory", "--max_new_tokens", "--lisa_config", "--deepspeed_config"} <= spelled


def test_a_value_keeps_its_spelling_and_so_does_what_follows_two_hyphens() -> None:
    one = terminal.Parser(prog="x")
    one.add_argument("--a-b")
    one.add_argument("rest", nargs="*")
    assert one.parse_args(["--a_b=--a_b", "--", "--a_b"]) == argparse.Namespace(a_b="--a_b", rest=["--a_b"])
    with pytest.raises(ConfigError, match=r"unrecognized arguments: --a_c; see `x --help`"):
        one.parse_args(["--a_c"])


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """A file that a command opens and waits for."""
    os.mkfifo(tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


READERS = [
    ["plan", "FILE"],
    ["plan", "--model", "FILE/config.json", "--lisa-config", "FILE"],
    ["check", "FILE"],
    ["profile", "FILE", "--out", "scores.json"],
    ["report", "layers", "FILE"],
]


@pytest.mark.parametrize("arguments", READERS, ids=" ".join)
def test_ctrl_c_is_one_line_and_130(waiting: Path, arguments: list[str]) -> None:
    words = [word.replace("FILE", str(waiting)) for word in arguments]
    started = subprocess.Popen([*LISA_DS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer = open_when_read(waiting, started)
    for _ in range(6):  # one that comes just before the read is noticed after it, as by any Python program
        started.send_signal(signal.SIGINT)
        try:
            out, err = started.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            continue
    os.close(writer)
    assert (started.returncode, out, err) == (130, "", "lisa-ds: interrupted\n")


def open_when_read(path: Path, reader: subprocess.Popen[str]) -> int:
    for _ in range(600):
        assert reader.poll() is None, reader.communicate()
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody has opened it yet
            time.sleep(0.1)
    raise AssertionError("the command never opened its file")


SPEAKERS = [
    ["plan", "--model", "Qwen/Qwen2.5-7B"],
    ["plan", "--model", "gpt2", "--json"],
    ["plan", "--help"],
    ["--version"],
    [],
    ["plan", "--model", "no/such/model"],
]


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", SPEAKERS, ids=" ".join)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str], buffered: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    both = "no/such/model" in arguments  # whose message is on stderr
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    with os.fdopen(writes, "w") as stdout:
        stderr: Any = stdout if both else subprocess.PIPE
        done = subprocess.run([*LISA_DS, *arguments], stdout=stdout, stderr=stderr, text=True, env=environment)
    assert done.returncode == 141 or (buffered and done.returncode == 0)  # argparse, of its own accord
    assert not done.stderr


def test_a_broken_pipe_of_the_commands_own_is_raised() -> None:
    def sends() -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        terminal.run(sends)


def test_output_that_cannot_be_written_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*LISA_DS, *SPEAKERS[0]], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "lisa-ds: error: cannot write all output: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_a_letter_is_no_reason_to_fail(tmp_path: Path, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    words = ["init", "日本.yaml", "--model", "x/y", "--data", "ü"]
    done = subprocess.run([*LISA_DS, *words], cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "日本.yaml").exists()
    assert ("wrote 日本.yaml" if encoding == "utf-8" else r"wrote \u65e5\u672c.yaml") in done.stdout.decode(encoding)


def test_a_closed_output_is_left_alone() -> None:
    done = subprocess.run(["bash", "-c", '"$@" >&-', "-", *LISA_DS, *SPEAKERS[0]], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_command_there_is_the_help_with_a_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone
    for name, one in parsers().items():
        assert max(map(len, one.format_help().splitlines())) <= 80, name
    names = [name.split()[1] for name in parsers() if name.count(" ") == 1 and name.startswith("lisa-ds ")]
    listed = alone.split("COMMAND\n")[1].splitlines()
    assert [line.split()[0] for line in listed] == names
    assert all(len(line.split()) > 3 for line in listed)
    assert main(["report"]) == 0
    assert "layers" in capsys.readouterr().out
