"""Layouts of chat templates: where answers are found, what is refused, and what a template leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from lisa_ds.data.answers import Note
from lisa_ds.errors import DataError
from tests.data.rows import fresh_cache
from tests.data.template_cases import (
    ASKS,
    CALLS,
    DEEPSEEKS,
    EOS,
    KINDS,
    MARK,
    PLAINLY,
    SAYS,
    TEMPLATES,
    TOOLS,
    learned,
    returned,
    says,
    tokenizer,
    tokens,
    user,
)

__all__ = ["fresh_cache"]

# --- layouts of other templates -----------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "asks within the loop (Zephyr)": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
        ["b" + EOS, "d" + EOS],
    ),
    "asks with nothing (Llama 2)": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        [" b " + EOS, " d " + EOS],
    ),
    "asks with a word and a space (Vicuna)": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        [" b" + EOS, " d" + EOS],
    ),
    "the end of a text behind all turns": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% else %}{{ eos_token }}{% endif %}",
        ["b", "d" + EOS],
    ),
    "the end of a turn before the next": (
        "{% for m in messages %}{% if not loop.first %}{{ eos_token }}{% endif %}<|{{ m.role }}|>{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ eos_token }}<|assistant|>{% endif %}",
        ["b" + EOS, "d"],
    ),
    "a line break ends a turn": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ["b\n", "d\n"],
    ),
    "by number": (
        "{% for i in range(messages | length) %}{% set m = messages[i] %}" + SAYS + "{% endfor %}" + ASKS,
        ["b" + EOS, "d" + EOS],
    ),
    "by a macro": (
        "{% macro write(m) %}{% for part in [m.content] %}" + SAYS + "{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ write(m) }}{% endfor %}" + ASKS,
        ["b" + EOS, "d" + EOS],
    ),
    "captured and trimmed": (
        "{% set all %}{% for m in messages %}" + SAYS + "{% endfor %}{% endset %}{{ all | trim }}" + ASKS,
        ["b" + EOS, "d" + EOS],
    ),
    "loops within the loop": (
        "{% for m in messages %}{% for n in messages %}{% if n is sameas m %}" + SAYS + "{% endif %}{% endfor %}"
        "{% for n in messages if n.role == 'tool' %}{{ n.content }}{% endfor %}{% endfor %}" + ASKS,
        ["b" + EOS, "d" + EOS],
    ),
    "says first how many turns there are": (
        "{{ messages | length }}{% for m in messages %}" + SAYS + "{% endfor %}" + ASKS,
        ["b" + EOS, "d" + EOS],
    ),
    "the last turn otherwise while it is the last": (
        "{% for m in messages %}" + SAYS.replace("{{ eos", "{{ '!' if loop.last }}{{ eos") + "{% endfor %}" + ASKS,
        ["b" + EOS, "d!" + EOS],
    ),
    "written over lines, whose blanks it keeps": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n        USER: {{ m.content }}\n    {% else %}\n"
        "        {{ 'ASSISTANT: ' + m.content + eos_token }}\n    {% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}\n    {{ 'ASSISTANT:' }}\n{% endif %}",
        [" b" + EOS, " d" + EOS],
    ),
    "asks with nothing, and writes what goes for all turns into the last question (Mistral)": (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ 'Be brief. ' if m == asked[-1] }}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ["b" + EOS, "d" + EOS],
    ),
    "goes on and breaks": (
        "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}"
        "{% endif %}" + SAYS + "{% endfor %}" + ASKS,
        ["b" + EOS, "d" + EOS],
    ),
}


@pytest.mark.parametrize(("template", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_answers_are_found_in_layouts_of_other_templates(template: str, expected: list[str]) -> None:
    made = tokens(template, [user("a"), says("b"), user("c"), says("d")])
    assert learned(made, tokenizer(template)) == expected


BACKWARDS = "{% for m in messages | reverse %}" + SAYS + "{% endfor %}" + ASKS
OUTSIDE = "{% for m in messages %}{% if not loop.last %}" + SAYS + "{% endif %}{% endfor %}{{ messages[-1].content }}"
SHUFFLED = "{{ messages[1].content if messages | length > 1 }}{{ messages[0].content }}" + ASKS

LATE = (
    "{% for m in messages %}{{ 'Be brief. ' if loop.last }}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [BACKWARDS, OUTSIDE, SHUFFLED, LATE])
def test_a_template_whose_answers_cannot_be_told_apart_is_refused(template: str) -> None:
    with pytest.raises(DataError) as error:
        tokens(template, [user("a"), says("b")])
    expected = (
        "rows.jsonl:1: the tokenizer's chat template does not let turn 2 (assistant) be told from the rest of the"
    )
    assert str(error.value) == f"{expected} conversation; {MARK}, or set data.loss_on: all"
    everything = tokens(template, [user("a"), says("b")], loss_on_all=True)
    assert everything.labels == everything.ids


# --- what a template leaves out -----------------------------------------------------------------------------------------

NO_SYSTEM = PLAINLY.replace("{{ '<|user|>'", "{% if m.role == 'system' %}{% continue %}{% endif %}{{ '<|user|>'")
NO_TOOL = NO_SYSTEM.replace("'system'", "'tool'").replace("m.content }}", "m.content }}{{ m.tool_calls }}")
CALL_ONLY = PLAINLY.replace("{{ m.content }}", "{{ m.tool_calls if m.tool_calls else m.content }}")
NAME_ONLY = PLAINLY.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
)
IGNORE = "set data.chat_template to one that does, or leave it out with data.ignore: [{}]"
ONE = "set data.chat_template to one that does"
LEFT_OUT = [
    (
        PLAINLY,
        [user(), says("b", reasoning_content="hm")],
        "reasoning_content of turn 2 (assistant)",
        "reasoning_content",
    ),
    (
        PLAINLY,
        [user(), says("b", reasoning_content="b")],
        "reasoning_content of turn 2 (assistant)",
        "reasoning_content",
    ),
    (PLAINLY, [user(name="Ann"), says("b")], "name of turn 1 (user)", "name"),
    (PLAINLY, [user(name="user"), says("b")], "name of turn 1 (user)", "name"),
    (PLAINLY, [user(), says("b", **CALLS)], "tool_calls of turn 2 (assistant)", "tool_calls"),
    (NAME_ONLY, [user(), says("b", **CALLS)], "tool_calls.function.arguments of turn 2 (assistant)", "tool_calls"),
    (PLAINLY, "tools", "tools", "tools"),
    (NO_SYSTEM, KINDS["system"], "content of turn 1 (system)", None),
    (NO_TOOL, KINDS["call and return"], "content of turn 3 (tool)", None),
    (CALL_ONLY, [user(), says("b", **CALLS)], "content of turn 2 (assistant)", None),
    (
        PLAINLY.replace("m.content", "m.content.split('</think>')[-1]"),
        KINDS["thoughts in content"],
        "content up to </think> of turn 2 (assistant)",
        None,
    ),
    (
        PLAINLY.replace("m.content", "m.content[:5]"),
        [user(), says("it is seven")],
        "content of turn 2 (assistant)",
        None,
    ),
]


@pytest.mark.parametrize(("template", "messages", "what", "key"), LEFT_OUT)
def test_what_a_template_leaves_out_is_refused_by_name(
    template: str, messages: Any, what: str, key: str | None
) -> None:
    tools = TOOLS if messages == "tools" else None
    messages = [user(), says("b")] if messages == "tools" else messages
    with pytest.raises(DataError) as error:
        tokens(template, messages, tools)
    assert str(error.value) == (
        f"rows.jsonl:1: the tokenizer's chat template does not write {what}, so it would be lost; "
        f"{IGNORE.format(key) if key else ONE}"
    )


def test_a_better_template_of_the_same_model_is_named() -> None:
    if not TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    with pytest.raises(DataError) as error:
        tokens(TEMPLATES["deepseek_r1_distill"], KINDS["thoughts in content"])
    assert str(error.value) == (
        "rows.jsonl:1: the tokenizer's chat template does not write content up to </think> of turn 2 (assistant), so it "
        "would be lost; set data.chat_template: deepseek_r1_distill_training"
    )
    by = tokenizer(TEMPLATES["deepseek_r1_distill_training"])
    assert learned(tokens(by, KINDS["thoughts in content"]), by)[0].endswith(
        "<think>\nsix and one\n</think>\n\nseven" + DEEPSEEKS
    )


def test_names_of_tools_that_were_called_are_no_loss() -> None:
    template = PLAINLY.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls if m.tool_calls }}")
    tokens(template, KINDS["call and return"])
    with pytest.raises(DataError, match=r"does not write name of turn 3 \(tool\)"):
        tokens(template, [user(), says("", **CALLS), returned("sunny", name="other"), says("Sunny.")])


@pytest.mark.parametrize(
    ("template", "kind", "notes"),
    [
        ("qwen3", "earlier reasoning", Note.THOUGHT_LEFT_OUT),
        ("gptoss", "call with reasoning", Note.THOUGHT_LEFT_OUT),
        ("deepseek_r1_distill", "several turns", Note.ASKED_OTHERWISE),
        ("qwen3_5_think", "earlier reasoning", Note.THOUGHT_LEFT_OUT | Note.ASKED_OTHERWISE),
        ("glm4moe", "one turn", Note.NO_END),
        ("qwen3", "several turns", Note(0)),
        ("gemma", "several turns", Note(0)),
    ],
)
def test_what_a_user_should_know_is_noted(template: str, kind: str, notes: Note) -> None:
    if template not in TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    assert tokens(TEMPLATES[template], KINDS[kind]).notes == notes
