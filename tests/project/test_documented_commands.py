"""Every `lisa-ds ...` and `launch/train.py ...` that documentation, helps, messages and recipes name is one that exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from lisa_ds.cli import parser
from lisa_ds.errors import ConfigError
from lisa_ds.train import command

ROOT = Path(__file__).parents[2]
COMMANDS = next(action.choices for action in parser.build()._actions if action.choices)
TEXTS = [
    path
    for pattern in ("*.md", "docs/*.md", "configs/**/*.yaml", "launch/*", "lisa_ds/**/*.py", "containers/*")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path.name != "CHANGELOG.md"
]
_END = re.compile(r"\s#.*|\s[|>;&].*|\s*\.\.\.$|\s*…$")


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Each command of a text, and whether it stands on a line of its own: then it has to be whole."""
    joined = re.sub(r"\\\n\s*", "", text)
    for line in joined.splitlines():
        stripped = re.sub(r"\s#.*", "", line.lstrip("# ")).strip()
        whole = re.match(
            r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:srun |deepspeed .*--no_python |deepspeed .*launch/|lisa-ds )", stripped
        )
        if whole and "`" not in stripped:
            yield stripped, True
        for quoted in re.findall(r"`+((?:srun |deepspeed [^`]*)?(?:lisa-ds|launch/train\.py) [^`]+)`+", line):
            yield quoted, False


def words_of(line: str) -> tuple[str, list[str]] | None:
    line = _END.sub("", line)
    for program in ("lisa-ds", "launch/train.py"):
        before, found, after = line.partition(f"{program} ")
        if found and not before.endswith("/") and "{" not in after.replace("={", ""):
            return program, shlex.split(after.replace("[", " ").replace("]", " ") if "key=value" in after else after)
    return None


NAMED = [
    pytest.param(program, words, whole, id=f"{path.relative_to(ROOT)}: {program} {' '.join(words)}"[:120])
    for path in TEXTS
    for line, whole in commands(path.read_text())
    if (split := words_of(line)) is not None
    for program, words in [split]
]


@pytest.mark.parametrize(("program", "words", "whole"), NAMED)
def test_a_command_that_is_named_exists(program: str, words: list[str], whole: bool) -> None:
    words = [word for word in words if word not in ("...", "…")]
    if program == "lisa-ds" and words[:1] == ["COMMAND"]:
        return
    if program == "lisa-ds" and not words[0].startswith("-"):
        assert words[0] in COMMANDS
    one = parser.build() if program == "lisa-ds" else command.build_parser()
    try:
        arguments, rest = one.parse_known_args(words)
    except ConfigError as error:
        if whole or not ("are required" in str(error) or "expected one argument" in str(error)):
            raise
    except SystemExit:  # --help, --version
        return
    else:
        assert [word for word in rest if word.startswith("-")] == []
        for word in (*rest, *vars(arguments).values()):
            if isinstance(word, (str, Path)) and str(word).startswith("configs/"):
                assert (ROOT / word).exists()


def test_commands_are_found() -> None:
    found = [" ".join([param.values[0], *param.values[1]]) for param in NAMED]  # type: ignore[list-item]
    assert len(found) > 60
    for text in (
        "lisa-ds init run.yaml",  # README.md
        "lisa-ds train run.yaml training.learning_rate=1e-4",
        "lisa-ds check --lisa_config run.yaml --hostfile hosts",  # docs/check.md, behind the launcher
        "lisa-ds plan --lisa_config configs/recipes/llama-3.1-8b-24gb.yaml --world-size 1 --gpu-memory 24GB",
        "launch/train.py --lisa_config run.yaml deepspeed=configs/ds_zero3_tp.json",
        "lisa-ds ops --build",  # in a message
    ):
        assert text in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lisa-ds plan run.yaml --gpu-mem 1GB", "--gpu-mem"),
        ("lisa-ds frobnicate run.yaml", "frobnicate"),
        ("lisa-ds report layers runs/a --format pdf", "pdf"),
        ("lisa-ds export checkpoint-1", "are required"),
        ("lisa-ds plan --lisa_config configs/none.yaml", "none.yaml"),
    ],
)
def test_one_that_does_not_would_be_found(text: str, message: str) -> None:
    ((line, whole),) = commands(text)
    split = words_of(line)
    assert split is not None
    with pytest.raises((AssertionError, ConfigError), match=message):
        test_a_command_that_is_named_exists(*split, whole)
