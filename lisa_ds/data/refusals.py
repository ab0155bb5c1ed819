"""Refuses fields that change what a row means and are not supported here, each with a remedy.

The user may still train on such rows, by naming the fields in ``data.ignore``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lisa_ds.data.fields import Fields
from lisa_ds.errors import DataError

_CONVERSATIONS = ("alpaca", "messages", "prompt_completion")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
_FORMS_OF_OTHERS = ("chosen", "rejected", "preferred_output", "input_ids", "segments")
_TO_ALPACA = "with data.columns, name the prompt instruction and the completion output"


@dataclass(frozen=True)
class _Refusal:
    names: tuple[str, ...]
    why: str  # with the remedy; ``{name}`` is the field's
    forms: tuple[str, ...] = (*_CONVERSATIONS, "text", "classification")
    when: Callable[[Any], bool] = lambda value: True
    unless: str = ""  # another field, that says the same and is read


def _desirable(value: Any) -> bool:
    """Whether a label says desirable or not (preference data), rather than naming a class."""
    return isinstance(value, bool) or str(value).strip().lower() in ("true", "false", "0", "1", "0.0", "1.0")


_OF_ROWS = (
    _Refusal(
        (
            *("chosen", "rejected", "rejected_response", "rejected_messages"),
            *("preferred_output", "non_preferred_output"),
        ),
        "is of a preference pair, whose answers are better and worse and not simply learned; train such rows with "
        "TRL's DPOTrainer and lisa_ds.attach (docs/huggingface.md)",
    ),
    _Refusal(
        ("label", "kto_tag", "desirable"),
        "says whether an answer is wanted (KTO), and an unwanted one must not be learned; keep the rows whose answer "
        "is wanted, or train all of them with TRL's KTOTrainer",
        _CONVERSATIONS,
        _desirable,
    ),
    _Refusal(
        ("reward", "rewards", "score", "scores", "rating", "ratings"),
        "says how good an answer is, and all are learned alike; keep the rows that are good enough",
        _CONVERSATIONS,
    ),
    _Refusal(
        ("weight", "weights", "sample_weight", "sample_weights", "loss_weight"),
        "is a weight of the row, and all rows are learned alike; leave out rows that should not count",
        when=lambda value: value != 1,
    ),
    _Refusal(
        _MEDIA,
        "is for a model that sees or hears, and rows are trained on as text alone; leave out rows about it",
    ),
    _Refusal(
        ("input_ids", "labels"),
        "is of rows that were turned into tokens elsewhere, and only texts and turns are read; give the text "
        "(the class of a text is named label)",
    ),
    _Refusal(
        ("loss_mask", "completion_mask", "assistant_mask", "assistant_masks", "loss_scale"),
        "says which tokens are learned; give each turn of messages a weight of 0 or 1 instead",
    ),
    _Refusal(
        ("segments",),
        "holds texts of which only some are learned (axolotl's input_output); give messages, each turn with a weight "
        "of 0 or 1",
    ),
    _Refusal(
        ("chat_template_kwargs", "chat_template"),
        "changes the chat template for one row; write all rows for one template, and set data.chat_template",
        _CONVERSATIONS,
    ),
    _Refusal(
        ("system", "history", "input", "tools", "functions"),
        f"goes with an instruction, not with a prompt that is a text; {_TO_ALPACA}",
        ("prompt_completion",),
    ),
    _Refusal(
        ("context",),
        f"goes before a prompt in other data sets, and is not read here; {_TO_ALPACA}, and {{name}} input",
        ("prompt_completion",),
    ),
    _Refusal(
        ("context",),
        "belongs to the instruction in other data sets, and is not read here; set data.columns: {{context: input}}",
        ("alpaca",),
        unless="input",
    ),
    _Refusal(
        ("system_prompt", "system_message"),
        "is read under the name of system; set data.columns: {{{name}: system}}",
        ("alpaca", "messages"),
        unless="system",
    ),
    _Refusal(
        ("system_prompt", "system_message"),
        f"is read under the name of system, with an instruction; {_TO_ALPACA}, and {{name}} system",
        ("prompt_completion",),
    ),
    _Refusal(
        ("history",),
        "holds earlier turns; put them into the list of turns",
        ("messages",),
    ),
    _Refusal(
        ("reasoning_content", "reasoning", "thinking", "thoughts", "chain_of_thought"),
        "holds the thoughts before an answer; give messages, with reasoning_content in the answer's turn",
        ("alpaca", "prompt_completion"),
    ),
    _Refusal(
        ("text_pair", "text2", "sentence2"),
        "is the second text of a pair; join both in text",
        ("classification",),
    ),
)

_OF_TURNS = (
    _Refusal(("refusal",), "is what was said instead of an answer; put it into content"),
    _Refusal(_MEDIA, "is for a model that sees or hears, and rows are trained on as text alone; leave out the row"),
    _Refusal(
        ("train_detail", "training_detail"),
        "says which characters of a turn are learned; a turn is learned or not: give it a weight of 0 or 1",
    ),
    _Refusal(
        ("loss_weight", "loss_scale", "loss_mask"),
        "weighs or masks a part of a turn; a turn is learned or not: give it a weight of 0 or 1",
    ),
    _Refusal(
        ("tool_plan", "thoughts", "thinking_blocks", "reasoning_details"),
        "holds thoughts; they are read, as text, under the name of reasoning_content",
    ),
    _Refusal(
        ("tool_call", "function_calls"),
        "holds calls; they are read under the name of tool_calls, as a list",
    ),
    _Refusal(("tools", "functions"), "belongs to the row, beside the list of turns, under the name of tools"),
    _Refusal(("tool_responses", "tool_results"), "holds results of tools; give each a turn of role 'tool'"),
    _Refusal(
        ("channel", "recipient"),
        "is of a turn in Harmony's form; give its thoughts as reasoning_content and its calls as tool_calls",
    ),
    _Refusal(
        ("chosen", "rejected"),
        "is of a preference pair; train such rows with TRL's DPOTrainer and lisa_ds.attach (docs/huggingface.md)",
    ),
)


def refuse_columns(row: Fields, form: str | None) -> None:
    """Refuse unread columns once a row's form is read; in a row of no form, every column that has a known meaning.

    Raises:
        DataError: A column means something that is not supported.
    """
    for name, value in row.rest():
        if form is None and name not in _FORMS_OF_OTHERS:
            continue
        for refusal in _OF_ROWS:
            if (form is None or form in refusal.forms) and _applies(refusal, row, name, value):
                raise _refused(row, name, refusal)


def refuse_turn_fields(turn: Fields) -> None:
    """Refuse unread fields of a turn.

    Raises:
        DataError: A field means something that is not supported.
    """
    for name, value in turn.rest():
        for refusal in _OF_TURNS:
            if _applies(refusal, turn, name, value):
                raise _refused(turn, name, refusal)


def refuse_placeholders(row: Fields, texts: Collection[str]) -> None:
    """Refuse placeholders such as ``<image>`` in a row that has a column for what they stand for, even an empty one.

    Raises:
        DataError: A text has a placeholder.
    """
    if not any(name in row for name in _MEDIA):
        return
    for text in texts:
        for placeholder in _PLACEHOLDERS:
            if placeholder in text:
                raise DataError(
                    f"{row.place}: {placeholder} stands for what a text model does not see; leave out the row, or "
                    f"remove it from the text"
                )


def _refused(fields: Fields, name: str, refusal: _Refusal) -> DataError:
    why = refusal.why.format(name=name)
    return fields.refused(name, f"{why}; to train without it, set data.ignore: [{name}]")


def _applies(refusal: _Refusal, fields: Fields, name: str, value: Any) -> bool:
    return name in refusal.names and refusal.when(value) and not fields.says(refusal.unless)
