"""Figures and files of figures as parts of an HTML page, and tables in Markdown as its elements."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

LONG_CELL = 40
"""Characters of a cell above which it is broken into lines."""

_GRID = ("#cccccc", "#e5e5e5", "#e6e6e6", "#f2f2f2")  # colours of lines behind the data

_KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def svg(figure: Any, name: str, *, follows_theme: bool = True) -> Markup:
    """A figure of matplotlib's as an SVG element that is as wide as what it stands in.

    Args:
        figure: The figure.
        name: What it shows, for those who do not see it.
        follows_theme: Whether what is black takes the colour of the page's text, and the lines of a grid that of its lines.
    """
    written = io.StringIO()
    figure.savefig(
        written, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r' id="[a-zA-Z0-9.]+_\d+"', "", text
    )  # numbers of groups, which other figures of the page have as well
    if follows_theme:
        text = re.sub(rf"stroke: (?:{'|'.join(_GRID)})", "stroke: var(--line)", text.replace("#000000", "currentColor"))
    size = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text)
    assert size is not None  # matplotlib writes it
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1))


def picture(path: Path) -> Markup:
    """A file of a figure as an image element that holds it.

    Raises:
        OSError: The file cannot be read.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup('<img src="data:{};base64,{}" alt="{}">').format(_KINDS[path.suffix.lower()], data, _title(path))


def pictures(directory: Path) -> dict[str, Path]:
    """The figures of a comparison under their names: SVG where there is one, else PNG."""
    found: dict[str, Path] = {}
    for suffix in _KINDS:
        for place in (directory, directory / "figures"):
            for path in sorted(place.glob(f"*{suffix}")):
                found.setdefault(_title(path), path)
    return dict(sorted(found.items()))


def markdown(text: str) -> Markup:
    """Headings, paragraphs, lists, code and tables of a Markdown text; pictures are left out, of links the text stays."""
    parts: list[Markup] = []
    for i, piece in enumerate(re.split(r"^```.*$\n?", text.replace("\r\n", "\n"), flags=re.MULTILINE)):
        if i % 2:  # between two fences
            parts.append(Markup("<pre>{}</pre>").format(piece.rstrip("\n")))
        else:
            parts += [part for block in re.split(r"\n\s*\n", piece.strip()) for part in _block(block)]
    return Markup("\n").join(parts)


def _block(block: str) -> Iterator[Markup]:
    lines = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", block).strip().splitlines()  # pictures have a place of their own
    while lines and (heading := re.match(r"(#{1,6})\s+(.*)", lines[0])):
        level = min(6, len(heading[1]) + 2)  # below those of the page
        yield Markup("<h{0}>{1}</h{0}>").format(level, _spans(heading[2]))
        lines = lines[1:]
    if len(lines) > 1 and "|" in lines[0] and re.fullmatch(r"[\s|:-]*-[\s|:-]*", lines[1]):
        yield _table(lines)
    elif lines and all(re.match(r"\s*[-*] ", line) for line in lines):
        items = [Markup("<li>{}</li>").format(_spans(re.sub(r"^\s*[-*] ", "", line))) for line in lines]
        yield Markup("<ul>{}</ul>").format(Markup("").join(items))
    elif lines:
        yield Markup("<p>{}</p>").format(_spans(" ".join(lines)))


def _table(lines: list[str]) -> Markup:
    rows = [_cells(line) for line in (lines[0], *lines[2:])]
    columns = max(map(len, rows))
    written = []
    for i, row in enumerate(rows):
        cell_of = (Markup('<td class="long">{}</td>'), Markup("<td>{}</td>")) if i else (Markup("<th>{}</th>"),) * 2
        whole = [*row, *[""] * (columns - len(row))]
        cells = [cell_of[len(cell) <= LONG_CELL].format(_spans(cell)) for cell in whole]
        written.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    head, *rest = written
    return Markup('<div class="scroll" tabindex="0"><table><thead>{}</thead><tbody>{}</tbody></table></div>').format(
        head, Markup("\n").join(rest)
    )


def _cells(line: str) -> list[str]:
    bare = line.strip().removeprefix("|")
    bare = bare[:-1] if bare.endswith("|") and not bare.endswith("\\|") else bare
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", bare)]


def _spans(text: str) -> Markup:
    """Escaped text with its bold and code."""
    safe = str(escape(re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)))
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe))


def _title(path: Path) -> str:
    return path.stem.replace("_", " ").replace("-", " ")
