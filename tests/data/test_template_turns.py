"""Which answers of a conversation are learned: by what the row says, and by marks in the template."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from lisa_ds.data.answers import Note
from lisa_ds.errors import DataError
from tests.data.rows import fresh_cache
from tests.data.template_cases import BY_MARKS, EOS, MARK, PLAINLY, learned, says, tokenizer, tokens, user

__all__ = ["fresh_cache"]

# --- which turns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    ("learn", "expected"),
    [
        ([None, None], ["one" + EOS, "two" + EOS]),
        ([False, None], ["two" + EOS]),
        ([None, False], ["one" + EOS]),
        ([True, False], ["one" + EOS]),
        ([True, None], ["one" + EOS, "two" + EOS]),
        ([False, False], []),
    ],
)
def test_a_row_says_which_answers_are_learned(learn: list[bool | None], expected: list[str], marked: bool) -> None:
    template = BY_MARKS if marked else PLAINLY
    flags = [{} if flag is None else {"learn": flag} for flag in learn]
    messages = [user("what?"), says("one", **flags[0]), user("and?"), says("two", **flags[1])]
    assert learned(tokens(template, messages), tokenizer(template)) == expected
    everything = "".join(learned(tokens(template, messages, loss_on_all=True), tokenizer(template)))
    assert [text in everything for text in ("one", "two")] == [flag is not False for flag in learn]
    assert "what?" in everything


def test_an_empty_turn_and_a_greeting_are_learned_if_the_row_says_so() -> None:
    by = tokenizer(PLAINLY)
    messages = [says("hello"), user("a"), says("")]
    assert learned(tokens(by, messages), by) == []
    messages = [{**one, "learn": True} if one["role"] == "assistant" else one for one in messages]
    assert learned(tokens(by, messages), by) == ["hello" + EOS, EOS]


# --- marks of the template ------------------------------------------------------------------------------------------------

MARKS_NOTHING = PLAINLY + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
MARKS_THE_QUESTION = BY_MARKS.replace("== 'assistant'", "== 'user'")
MARKS_ALL = BY_MARKS.replace("{% if m.role == 'assistant' %}", "{% if true %}")
MARKS_THE_FIRST = BY_MARKS.replace("== 'assistant' %}", "== 'assistant' and loop.index == 2 %}")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (MARKS_NOTHING, "marks none of this conversation's answers with {% generation %}"),
        (MARKS_THE_QUESTION, "marks none of this conversation's answers with {% generation %}"),
        (MARKS_ALL, "marks turn 1 (user) with {% generation %}, which is no answer"),
    ],
)
def test_marks_that_cannot_be_right_are_refused(template: str, what: str) -> None:
    with pytest.raises(DataError) as error:
        tokens(template, [user("a"), says("b"), user("c"), says("d")])
    assert str(error.value) == f"rows.jsonl:1: the tokenizer's chat template {what}; {MARK}"


@pytest.mark.parametrize("sign", ["-", "+", ""])
def test_marks_are_known_however_they_treat_blanks(sign: str) -> None:
    template = BY_MARKS.replace("{% generation", f"{{%{sign} generation")
    template = template.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
    assert learned(tokens(template, [user("a"), says("b")]), tokenizer(template)) == ["b"]


def test_marks_on_some_answers_are_followed_and_told() -> None:
    made = tokens(MARKS_THE_FIRST, [user("a"), says("b"), user("c"), says("d")])
    assert learned(made, tokenizer(MARKS_THE_FIRST)) == ["b" + EOS]
    assert made.notes == Note.NOT_MARKED


def test_marks_are_found_where_transformers_loses_them() -> None:
    """A tokenizer that says of a mark's first blank that no token holds it: every later answer went without loss."""
    by = tokenizer(BY_MARKS)
    by.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    messages = [user("a"), says(" b"), user("c"), says(" d")]
    given = by.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert not any(given["assistant_masks"])
    assert learned(tokens(by, messages), by) == ["b" + EOS, "d" + EOS]
