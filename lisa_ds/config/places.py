"""Line and column of a mistake in JSON or YAML: parsers report where they noticed it, which may be lines later."""

from __future__ import annotations

import json

import yaml


def line_and_column(text: str, position: int) -> tuple[int, int]:
    """Both from 1.

    Example:
        >>> line_and_column("a: 1", 3)
        (1, 4)
    """
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def of_json(error: json.JSONDecodeError) -> int:
    """The position of what is wrong.

    Something missing is reported behind the last token before it, not in front of the next, which may be lines later.
    """
    text, position = error.doc, error.pos
    written = len(text[:position].rstrip())
    following = text[position : position + 1]
    if not error.msg.startswith("Expecting") or "\n" not in text[written:position] or not written:
        return position
    if following in ("}", "]") and text[written - 1] == ",":
        return written - 1  # there is one comma too much
    return written if following in ("", "}", "]") or "delimiter" in error.msg else position


def of_yaml(error: yaml.MarkedYAMLError) -> str:
    """What is wrong, as ``line 2: not valid YAML: what (column 5)``.

    A quote or bracket that is never closed is reported where it was opened: the parser notices at the end of the file.
    """
    mark, opened = error.problem_mark, error.context_mark
    what = str(error.problem)
    if mark is not None and opened is not None:
        inside = (error.context or "").removeprefix("while ").partition(" ")[2]
        unclosed = "end of stream" in what or "stream end" in what or inside == "a simple key"
        if unclosed:
            mark, what = opened, what if inside == "a simple key" else f"{what}, for {inside} that begins here"
        elif opened.line != mark.line:
            what += f", in {inside} that begins in line {opened.line + 1}"
    if mark is None:
        return f"not valid YAML: {what}"
    return f"line {mark.line + 1}: not valid YAML: {what} (column {mark.column + 1})"


def of_key_given_twice(text: str) -> int | None:
    """The position of the first key of JSON text that its object has already; None if none is found.

    The text is parsed as YAML, which JSON is a part of, tabs aside: Python's JSON parser gives no positions.
    """
    try:
        nodes = [yaml.compose(text.replace("\t", " "), yaml.SafeLoader)]
    except yaml.YAMLError:
        return None
    places = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                nodes.append(value)
                if key.value in keys:
                    places.append(int(key.start_mark.index))
                keys.add(key.value)
    return min(places, default=None)
