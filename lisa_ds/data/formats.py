"""The forms that rows come in, told by their columns, and the one form that each is brought to.

======================  ==============================================================================
columns                 what they hold
======================  ==============================================================================
instruction, output     alpaca; with ``input`` and ``system`` if they are there
messages                turns of ``role`` and ``content``
conversations           ShareGPT: turns of ``from`` and ``value``
prompt, completion      two texts, or two lists of ``messages``
text, label             classification
text                    plain text, for continual pre-training
======================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lisa_ds.data.files import Row
from lisa_ds.errors import DataError

Kind = Literal["conversation", "pair", "text", "classification"]
Message = dict[str, str]

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
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
    read: Callable[[Row], dict[str, Any]]

    def __call__(self, row: Row) -> dict[str, Any]:
        """The row's content: ``messages``, ``text``, or ``text`` and ``label``.

        Raises:
            DataError: A column is missing or holds something else.
        """
        missing = [column for column in self.columns if column not in row.fields]
        if missing:
            raise DataError(
                f"{row.place}: is without {_list(missing)}, while the rows before are {self.name}; "
                f"found {_list(row.fields)}"
            )
        return self.read(row)


def tell(row: Row, option: str) -> Form:
    """The form of a data set, by its first row.

    Raises:
        DataError: No form has these columns, or not the one that was asked for.
    """
    forms = [form for form in FORMS if option in ("auto", form.option)]
    for form in forms:
        if all(column in row.fields for column in form.columns):
            if form.kind == "pair" and not isinstance(row.fields["prompt"], str):
                return _PAIR_OF_TURNS
            return form
    asked = "" if option == "auto" else f"data.format is {option!r}, but "
    accepted = "\n".join(f"  {form.name + ':':<21}{', '.join(form.columns)}" for form in forms)
    raise DataError(
        f"{row.place}: {asked}no accepted form has the columns {_list(row.fields)}{_renaming(forms, row.fields)}\n"
        f"Accepted columns (others are ignored):\n{accepted}"
    )


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns renamed as ``data.columns`` says.

    Raises:
        DataError: A column to be renamed is not there.
    """
    if not columns:
        return row
    if missing := [column for column in columns if column not in row.fields]:
        raise DataError(f"{row.place}: data.columns renames {_list(missing)}; found {_list(row.fields)}")
    # What the new name stood for before is hidden.
    kept = {key: value for key, value in row.fields.items() if key not in columns and key not in columns.values()}
    return Row(row.place, kept | {new: row.fields[old] for old, new in columns.items()}, row.starts, row.ends)


def _alpaca(row: Row) -> dict[str, Any]:
    instruction, extra = _text(row, "instruction"), _text(row, "input", optional=True)
    system = _text(row, "system", optional=True)
    return {
        "messages": [
            *([_turn("system", system)] if system else []),
            _turn("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction),
            _turn("assistant", _text(row, "output")),
        ]
    }


def _messages(row: Row) -> dict[str, Any]:
    return {"messages": _turns(row, "messages", "role", "content", {role: role for role in _ROLES})}


def _sharegpt(row: Row) -> dict[str, Any]:
    turns = _turns(row, "conversations", "from", "value", _SHAREGPT)
    system = _text(row, "system", optional=True)
    return {"messages": [_turn("system", system), *turns] if system else turns}


def _pair(row: Row) -> dict[str, Any]:
    return {"messages": [_turn("user", _text(row, "prompt")), _turn("assistant", _text(row, "completion"))]}


def _pair_of_turns(row: Row) -> dict[str, Any]:
    roles = {role: role for role in _ROLES}
    prompt = _turns(row, "prompt", "role", "content", roles)
    if isinstance(row.fields["completion"], str):
        return {"messages": [*prompt, _turn("assistant", row.fields["completion"])]}
    return {"messages": [*prompt, *_turns(row, "completion", "role", "content", roles)]}


def _classification(row: Row) -> dict[str, Any]:
    label = row.fields["label"]
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise _wrong(row, "label", "a number or a name", label)
    if isinstance(label, str) and label.isdecimal():  # csv knows no numbers
        label = int(label)
    return {"text": _text(row, "text"), "label": label}


def _plain(row: Row) -> dict[str, Any]:
    return {"text": _text(row, "text")}


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


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(row: Row, column: str, *, optional: bool = False) -> str:
    value = row.fields.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong(row, column, "text", value)
    return _encodable(row, column, value)


def _turns(row: Row, column: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> list[Message]:
    turns = row.fields[column]
    if not isinstance(turns, list) or not turns:
        raise _wrong(row, column, f"a list of turns with {role_key!r} and {content_key!r}", turns)
    messages = []
    for number, turn in enumerate(turns):
        at = f"{column}[{number}]"
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise _wrong(row, at, f"a turn with {role_key!r} and {content_key!r}", turn)
        role, content = turn[role_key], turn[content_key]
        if not isinstance(role, str) or role not in roles:
            raise _wrong(row, f"{at}.{role_key}", f"one of {', '.join(roles)}", role)
        if isinstance(content, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" for part in content
        ):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise _wrong(row, f"{at}.{content_key}", "text", content)
        messages.append(_turn(roles[role], _encodable(row, f"{at}.{content_key}", content)))
    return messages


def _encodable(row: Row, column: str, text: str) -> str:
    r"""Refuse half of a surrogate pair: JSON may say ``\ud83d``, but that is no character and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(row, column, f"valid Unicode (character {error.start + 1} is half of a pair)", text) from None
    return text


def _wrong(row: Row, column: str, expected: str, value: object) -> DataError:
    shown = repr(value)
    return DataError(
        f"{row.place}: {column} should be {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"
    )


def _renaming(forms: Collection[Form], found: Mapping[str, Any]) -> str:
    """Which renaming would make the columns fit, if a single one of others' names does."""
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


def _list(names: Collection[str]) -> str:
    return ", ".join(map(repr, names)) if names else "no columns"
