"""The formats of rows, recognised by their columns, and the one format that each is converted to.

======================  ==============================================================================
columns                 what they hold
======================  ==============================================================================
instruction, output     alpaca; with ``input``, ``history``, ``system`` and ``tools`` if they are there
messages                turns of ``role`` and ``content``, with ``tools`` and ``system`` if they are there
conversations           ShareGPT: turns of ``from`` and ``value``, likewise
prompt, completion      two texts, or two lists of ``messages``
text, label             classification
text                    plain text, for continual pre-training
======================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lisa_ds.data.fields import Fields, Unused, listed, says_something
from lisa_ds.data.files import Row
from lisa_ds.data.refusals import refuse_columns, refuse_placeholders
from lisa_ds.data.turns import Turn, read_tools, read_turns, turn
from lisa_ds.errors import DataError

Kind = Literal["conversation", "pair", "text", "classification"]

# What others call our columns, for a better message: they are not guessed.
_SYNONYMS = {
    "output": ("response", "answer", "completion"),
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat"),
    "prompt": ("question", "query", "input"),
    "completion": ("answer", "response", "output", "target"),
    "text": ("content", "document", "sentence"),
    "label": ("labels", "class", "category", "target"),
}


@dataclass(frozen=True)
class Form:
    """How rows of one form are read."""

    name: str
    option: str  # its name in the config
    columns: tuple[str, ...]
    kind: Kind
    read: Callable[[Fields, Unused], dict[str, Any]]

    def __call__(self, row: Row, unused: Unused) -> dict[str, Any]:
        """The row's content: ``messages`` and ``tools``, ``text``, or ``text`` and ``label``.

        Args:
            row: The row.
            unused: Counts what is not used.

        Raises:
            DataError: A column is missing, has a wrong value, or asks for something that is not supported.
        """
        missing = [column for column in self.columns if column not in row.fields]
        if missing:
            raise DataError(
                f"{row.place}: is without {listed(missing)}, while the rows before are {self.name}; "
                f"found {listed(row.fields)}"
            )
        fields = Fields(row.fields, row.place)
        content = self.read(fields, unused)
        refuse_columns(fields, "messages" if self.kind == "conversation" and self.option != "alpaca" else self.option)
        texts = [turn["content"] for turn in content.get("messages", ())] or [content["text"]]
        refuse_placeholders(fields, texts)
        unused.columns.update(name for name, _ in fields.rest())
        unused.placeholders.update(name for name in ("<image>",) if any(name in text for text in texts))
        return content


def tell(row: Row, option: str) -> Form:
    """The form of a data set, recognised by its first row.

    Raises:
        DataError: No form has these columns, or not the one that was asked for.
    """
    forms = [form for form in FORMS if option in ("auto", form.option)]
    fields = Fields(row.fields, row.place)
    for form in forms:
        if form.kind == "classification" and option == "auto" and row.fields.get("label") is None:
            continue  # a text in a data set whose other rows may have labels
        if all(column in row.fields for column in form.columns):
            if form.kind == "pair" and not isinstance(row.fields["prompt"], str):
                return _PAIR_OF_TURNS
            return form
    refuse_columns(fields, None)
    asked = "" if option == "auto" else f"data.format is {option!r}, but "
    accepted = "\n".join(f"  {form.name + ':':<21}{', '.join(form.columns)}" for form in forms)
    raise DataError(
        f"{row.place}: {asked}no accepted form has the columns {listed(row.fields)}{_renaming(forms, row.fields)}\n"
        f"Accepted columns:\n{accepted}"
    )


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns renamed as ``data.columns`` says.

    Raises:
        DataError: A column that a form needs is not there under its old name.
    """
    if not columns:
        return row
    needed = {column for form in FORMS for column in form.columns}
    if missing := [old for old, new in columns.items() if new in needed and old not in row.fields]:
        raise DataError(f"{row.place}: data.columns renames {listed(missing)}; found {listed(row.fields)}")
    found = {old: new for old, new in columns.items() if old in row.fields}
    # What the new name stood for before is hidden.
    kept = {key: value for key, value in row.fields.items() if key not in found and key not in found.values()}
    return Row(
        row.place,
        kept | {new: row.fields[old] for old, new in found.items()},
        row.starts,
        row.ends,
    )


def hidden(row: Row, columns: Mapping[str, str]) -> list[str]:
    """The columns that are not empty and whose name :func:`rename` gives to others."""
    names = {new for old, new in columns.items() if old in row.fields} - columns.keys()
    return [name for name in names if says_something(row.fields.get(name))]


def _alpaca(row: Fields, unused: Unused) -> dict[str, Any]:
    instruction, extra = row.text("instruction"), row.text("input", optional=True)
    turns = [
        *_history(row),
        turn("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction),
        turn("assistant", row.text("output")),
    ]
    return _conversation(row, turns)


def _history(row: Fields) -> list[Turn]:
    """Earlier questions and answers, as LLaMA-Factory has them: a list of pairs of texts."""
    history = row.take("history") or []
    if not isinstance(history, list):
        raise row.wrong("history", "a list of [question, answer]", history)
    turns = []
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise row.wrong(f"history[{number}]", "a question and an answer", pair)
        question, answer = (row.encodable(f"history[{number}]", text) for text in pair)
        turns += [turn("user", question), turn("assistant", answer)]
    return turns


def _messages(row: Fields, unused: Unused) -> dict[str, Any]:
    return _conversation(row, read_turns(row, "messages", unused))


def _sharegpt(row: Fields, unused: Unused) -> dict[str, Any]:
    return _conversation(row, read_turns(row, "conversations", unused, ("from", "value")))


def _pair(row: Fields, unused: Unused) -> dict[str, Any]:
    return {"messages": [turn("user", row.text("prompt")), turn("assistant", row.text("completion"))], "tools": None}


def _pair_of_turns(row: Fields, unused: Unused) -> dict[str, Any]:
    prompt = read_turns(row, "prompt", unused)
    if isinstance(row.values["completion"], str):
        return _conversation(row, [*prompt, turn("assistant", row.text("completion"))])
    return _conversation(row, [*prompt, *read_turns(row, "completion", unused)])


def _conversation(row: Fields, turns: list[Turn]) -> dict[str, Any]:
    """Turns with the columns that apply to all of them: ``system`` and ``tools``."""
    system = row.text("system", optional=True)
    if system and turns[0]["role"] == "system":
        if turns[0]["content"] != system:
            raise row.refused("system", "and the conversation's own system turn differ; keep one")
        system = ""
    return {"messages": [turn("system", system), *turns] if system else turns, "tools": read_tools(row)}


def _classification(row: Fields, unused: Unused) -> dict[str, Any]:
    label = row.take("label")
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise row.wrong("label", "a number or a name", label)
    if isinstance(label, str) and label.isdecimal():  # csv knows no numbers
        label = int(label)
    return {"text": row.text("text"), "label": label}


def _plain(row: Fields, unused: Unused) -> dict[str, Any]:
    return {"text": row.text("text")}


FORMS = (
    Form("alpaca", "alpaca", ("instruction", "output"), "conversation", _alpaca),
    Form("messages", "messages", ("messages",), "conversation", _messages),
    Form("ShareGPT", "messages", ("conversations",), "conversation", _sharegpt),
    Form("prompt_completion", "prompt_completion", ("prompt", "completion"), "pair", _pair),
    Form("classification", "classification", ("text", "label"), "classification", _classification),
    Form("text", "text", ("text",), "text", _plain),
)
_PAIR_OF_TURNS = Form(
    "prompt_completion", "prompt_completion", ("prompt", "completion"), "conversation", _pair_of_turns
)


def _renaming(forms: Collection[Form], found: Mapping[str, Any]) -> str:
    """The renaming that would make the columns fit, if renaming a single column, by a name of other tools, does."""
    best: dict[str, str] | None = None
    for form in forms:
        renamed = {}
        for column in form.columns:
            if column not in found:
                near = [name for name in _SYNONYMS.get(column, ()) if name in found and name not in form.columns]
                if not near:
                    break
                renamed[near[0]] = column
        else:
            if best is None or len(renamed) < len(best):
                best = renamed
    if not best:
        return ""
    return "; set data.columns: {" + ", ".join(f"{old}: {new}" for old, new in best.items()) + "}"
