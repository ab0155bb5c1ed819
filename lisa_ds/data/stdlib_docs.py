"""``builtin:stdlib-docs``: docstrings of Python's standard library as questions and answers.

Every machine that runs this package has it. The source files are parsed, never imported; the same Python gives the
same bytes. Whole modules are held out, so that a test question is about a module that was not trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lisa_ds.cache import build_once

SPLITS = ("train", "test")

_TEST_SHARE = 12  # one package in so many is held out
_LONGEST_ANSWER = 600  # characters; cut between paragraphs
_SHORTEST_ANSWER = 20
_FULL_LINE = 50
_LONGEST_SIGNATURE = 100
_NOT_LIBRARY = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__"),
}
# Where the code lives -> the name people import it by. Other names that begin with "_" are private.
_PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "concurrent.futures._base": "concurrent.futures",
    "genericpath": "os.path",
    "posixpath": "os.path",
}


@dataclass(frozen=True)
class _Entry:
    module: str
    question: str
    answer: str

    @property
    def split(self) -> str:
        package = self.module.partition(".")[0]  # a package's modules stay together
        digest = hashlib.sha256(package.encode()).digest()
        return "train" if digest[0] % _TEST_SHARE else "test"


def corpus() -> Path:
    """A directory with ``train.jsonl`` and ``test.jsonl`` in alpaca form, built on first use."""
    version = "-".join([sys.implementation.cache_tag or sys.implementation.name, *map(str, sys.version_info[:3])])
    builder = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()
    return build_once(f"data/stdlib-docs-{version}-{builder[:12]}", write)


def write(directory: Path) -> None:
    """Write the corpus of the running Python."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry in _entries(Path(sysconfig.get_path("stdlib"))):
        row = {"instruction": entry.question, "input": "", "output": entry.answer}
        lines[entry.split].append(json.dumps(row, ensure_ascii=False) + "\n")
    for split, rows in lines.items():
        (directory / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


def _entries(root: Path) -> Iterator[_Entry]:
    seen: set[str] = set()  # an answer that was given before would leak from one split to the other
    for module, path in sorted(_modules(root)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # some Pythons ship templates that are no Python
                continue
        for entry in _documented(tree, module):
            if entry.answer not in seen:
                seen.add(entry.answer)
                yield entry


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in _NOT_LIBRARY or part.startswith("config-") for part in parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        module = _PUBLIC_NAMES.get(module, module)
        if not any(part.startswith("_") for part in module.split(".")):
            yield module, path


def _documented(parent: ast.AST, module: str, classes: tuple[str, ...] = ()) -> Iterator[_Entry]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, (ast.If, ast.Try)):  # definitions that depend on the platform
            yield from _documented(node, module, classes)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and _is_public(node.name):
            answer = _answer(ast.get_docstring(node))
            name = ".".join((module, *classes, node.name))
            if answer and (question := _question(node, name, is_method=bool(classes))):
                yield _Entry(module, question, answer)
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, module, (*classes, node.name))


def _is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def _answer(docstring: str | None) -> str | None:
    """The first paragraphs, as many as fit; None if they are too short to be an answer."""
    if docstring is None:
        return None
    paragraphs = [_unwrap(paragraph) for paragraph in docstring.strip().split("\n\n")]
    answer = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(answer) + 2 + len(paragraph) > _LONGEST_ANSWER:
            break
        answer += "\n\n" + paragraph
    if len(answer) > _LONGEST_ANSWER:
        answer = textwrap.shorten(answer, _LONGEST_ANSWER, placeholder=" ...")
    return answer if len(answer) >= _SHORTEST_ANSWER else None


def _unwrap(paragraph: str) -> str:
    """Join the lines of prose, which were broken to fit a page; leave lists, tables and examples alone."""
    lines = paragraph.split("\n")
    prose = all(line[:1].isalnum() or line[:1] in "'\"`(*" for line in lines) and " -- " not in paragraph
    full = all(len(line) >= _FULL_LINE for line in lines[:-1])
    return " ".join(lines) if prose and full else paragraph


def _question(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, *, is_method: bool) -> str | None:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if isinstance(node, ast.ClassDef):
        return f"What is the class `{name}` in Python?"
    if any(decorator.endswith((".setter", ".deleter")) for decorator in decorators):
        return None  # the getter has said it
    if any(decorator.endswith("property") for decorator in decorators):
        return f"What is the property `{name}` in Python?"
    return f"What does `{name}{_signature(node.args, is_method and 'staticmethod' not in decorators)}` do in Python?"


def _signature(arguments: ast.arguments, has_self: bool) -> str:
    """The parameters as written, without ``self`` and annotations; an ellipsis if they are too many to read."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if has_self:
        positional = arguments.posonlyargs or arguments.args
        del positional[:1]
    text = f"({ast.unparse(arguments)})"
    return text if len(text) <= _LONGEST_SIGNATURE else "(...)"
