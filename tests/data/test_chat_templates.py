"""Chat templates as models come with them: what of a conversation is learned, and what a template leaves out."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset, preview
from lisa_ds.data.answers import Note
from lisa_ds.data.tokenise import IGNORED, Tokeniser, Tokens
from lisa_ds.errors import ConfigError, DataError
from tests.train.builtin import smollm2

Turn = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))


def of_trl() -> dict[str, str]:
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec else None
    found = (path for place in places or () for path in Path(place, "chat_templates").glob("*.jinja"))
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(found)}


TEMPLATES = of_trl()
DEEPSEEKS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
ORIGINALS: list[Any] = [name for name in TEMPLATES if not name.endswith("_training")] or [
    pytest.param("none", marks=pytest.mark.skip(reason="needs trl with its chat templates"))
]


@cache
def vocabulary() -> Tokenizer:
    """Bytes, and as tokens of their own the marks that the templates write."""
    marks = sorted(
        {mark for text in TEMPLATES.values() for mark in re.findall(r"<[|\uff5c][^<>]+?[|\uff5c]?>|<[\w|]+>", text)}
    )
    special = ["<|pad|>", "<|end_of_text|>", *marks]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def tokenizer(template: str | dict[str, str]) -> Any:
    made = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary(), pad_token="<|pad|>", eos_token="<|end_of_text|>", bos_token="<|pad|>"
    )
    made.chat_template = template
    return made


def turn(role: str, content: str, **more: Any) -> Turn:
    return {"role": role, "content": content, **more}


def user(content: str = "what?", **more: Any) -> Turn:
    return turn("user", content, **more)


def says(content: str, **more: Any) -> Turn:
    return turn("assistant", content, **more)


def call(name: str, number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def returned(content: str, name: str = "look", number: int = 1) -> Turn:
    return turn("tool", content, name=name, tool_call_id=f"call_{number}")


PARAMETERS = {"type": "object", "properties": {"place": {"type": "string", "description": "where"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": PARAMETERS}}]
CALLS = {"tool_calls": [call("look", place="Rome")]}

# What a row may hold; turns, and whether tools come with them.
KINDS: dict[str, list[Turn]] = {
    "one turn": [user(), says("seven")],
    "several turns": [user("a"), says("one"), user("b"), says("two\n\ntwo"), user("c"), says("three")],
    "system": [turn("system", "be brief"), user(), says("seven")],
    "equal turns": [user("seven"), says("seven"), user("seven"), says("seven")],
    "template's words": [user("assistant"), says("assistant model user"), user("b"), says("</s> end")],
    "ends with a question": [user("a"), says("b"), user("c")],
    "empty answer": [user("a"), says(""), user("b"), says("c")],
    "greeting": [says("hello"), user("a"), says("b")],
    "reasoning": [user(), says("seven", reasoning_content="six and one")],
    "earlier reasoning": [user("a"), says("b", reasoning_content="hm"), user("c"), says("d", reasoning_content="ho")],
    "thoughts in content": [user(), says("<think>\nsix and one\n</think>\n\nseven")],
    "tools": [user(), says("seven")],
    "call": [user(), says("", **CALLS)],
    "call and return": [user(), says("", **CALLS), returned("sunny"), says("It is sunny.")],
    "call with words": [user(), says("Let me see.", **CALLS), returned("sunny"), says("It is sunny.")],
    "call with reasoning": [user(), says("", reasoning_content="look", **CALLS), returned("sunny"), says("Sunny.")],
    "two calls": [
        user(),
        says("", tool_calls=[call("look", place="Rome"), call("look", 2, place="Oslo")]),
        returned("sunny"),
        returned("rain", number=2),
        says("Sunny, and rain."),
        user("thanks"),
        says("Any time."),
    ],
}
WITH_TOOLS = {"tools", "call", "call and return", "call with words", "call with reasoning", "two calls"}


def row(messages: list[Turn], tools: Any = None) -> dict[str, Any]:
    return {"messages": json.dumps(messages), "tools": json.dumps(tools), "place": "rows.jsonl:1"}


def tokens(template: Any, messages: list[Turn], tools: Any = None, **options: Any) -> Tokens:
    made = tokenizer(template) if isinstance(template, (str, dict)) else template
    return Tokeniser(made, "conversation", 100_000, **options).row(row(messages, tools))


def learned(made: Tokens, by: Any) -> list[str]:
    """The stretches of text that carry loss."""
    shown = preview({"input_ids": made.ids, "labels": made.labels}, by)
    return [part.partition("⟧")[0] for part in shown.split("⟦")[1:]]


MARKED = {"qwen": TEMPLATES.get("qwen3_training", "")}

# --- against TRL's twins with {% generation %} marks, token by token ----------------------------------------------------

PLAIN = {"one turn", "several turns", "equal turns", "template's words", "ends with a question", "empty answer"}
"""Every template takes these."""

CALLING = {
    "glm4moe",
    "gptoss",
    "lfm2_v2",
    "muse_glimmer",
    "nemotron_3_nano",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_vl",
}
CALLING |= {"qwen3_5_nothink", "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "llama3_1", "llama3_2", "gemma4_v5"}
CALLING |= {
    "diffusion_gemma",
    "nemotron_3_super",
    "nemotron_3_ultra",
    "nemotron_3_5_lightning",
    "lfm2_2_5",
    "lfm2_2_5_v2",
}
REASONING = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "gptoss", "glm4moe", "muse_glimmer"}
REASONING |= {"nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning", "gemma4_v5"}
REASONING |= {"diffusion_gemma", "lfm2_2_5", "lfm2_2_5_v2"}


def must_be_taken(name: str, kind: str) -> bool:
    if kind in ("tools", "call", "call and return"):
        return name in CALLING
    if kind in ("reasoning", "earlier reasoning"):
        return name in REASONING
    if kind == "call with reasoning":
        return name in CALLING & REASONING
    return kind in PLAIN


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_model_s_own_template_is_masked_as_its_training_twin_or_refused(name: str) -> None:
    refused: dict[str, str] = {}
    for kind, messages in KINDS.items():
        tools = TOOLS if kind in WITH_TOOLS else None
        if problem := refusal(TEMPLATES[name], messages, tools):
            refused[kind] = problem
            continue
        ours = tokens(TEMPLATES[name], messages, tools)
        assert [label for label in ours.labels if label != IGNORED] == [
            token for token, label in zip(ours.ids, ours.labels, strict=True) if label != IGNORED
        ]
        if f"{name}_training" in TEMPLATES:
            compare(name, ours, messages, tools, kind)
    for kind, message in refused.items():
        assert not must_be_taken(name, kind), (kind, message)
        remedied(name, message, KINDS[kind], TOOLS if kind in WITH_TOOLS else None)


NEXT = ("", "<|user|>", "<|observation|>")  # how GLM's turns end, in its twin: with what begins the next
IN_PARTS = {"smolvlm", "idefics3", "llava_next"}  # templates that take content as a list of parts only


def reference(name: str, messages: list[Turn], tools: Any) -> tuple[list[int], list[bool]]:
    """Tokens and mask as transformers makes them of a template with marks."""
    if name.removesuffix("_training") in IN_PARTS:
        messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    by = tokenizer(TEMPLATES[name])
    made = by.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"], [bool(learned) for learned in made["assistant_masks"]]


def prompts(name: str, messages: list[Turn], tools: Any) -> list[str]:
    """What the model is asked with before each answer: how the text goes on when the assistant is to speak."""
    if name in IN_PARTS:
        messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    if name == "deepseekv3":
        messages = json.loads(json.dumps(messages))
        for one in (one for message in messages for one in message.get("tool_calls", ())):
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    by, found = tokenizer(TEMPLATES[name]), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number:
            options = {"tools": tools, "tokenize": False}
            asked = by.apply_chat_template(messages[:number], add_generation_prompt=True, **options)
            silent = by.apply_chat_template(messages[:number], **options)
            whole = by.apply_chat_template(messages, **options)
            ends = [max(i for i in range(len(asked) + 1) if other.startswith(asked[:i])) for other in (silent, whole)]
            found.append(asked[min(ends) :] + asked[-60:])
    return found


def compare(name: str, ours: Tokens, messages: list[Turn], tools: Any, kind: str) -> None:
    """Hold a mask to that of the twin.

    Twins also learn what the model is asked with, blanks behind the end of a turn, turns that say nothing and such as
    answer nothing. Everything else must be equal, token by token where the twin writes the same text.
    """
    ids, mask = reference(f"{name}_training", messages, tools)
    by = tokenizer(TEMPLATES[name])
    asked = prompts(name, messages, tools)
    mine = [label != IGNORED for label in ours.labels]
    if ids == ours.ids:
        extra = [i for i in range(len(ids)) if mine[i] and not mask[i]]
        assert by.decode([ids[i] for i in extra]) in ("", "<|tool_response>"), kind  # Gemma's end of a call
        start = 0
        while start < len(ids):
            end = start
            while end < len(ids) and mask[end] and not mine[end]:
                end += 1
            if end > start:
                left = by.decode(ids[start:end])
                before, after = start > 0 and mine[start - 1], end < len(ids) and mine[end]
                is_prompt = after and any(left in prompt for prompt in asked)
                is_end = before and left.replace("<|end_of_text|>", "").strip() in NEXT
                says_nothing = not before and not after and kind in ("empty answer", "greeting")
                assert is_prompt or is_end or says_nothing, (kind, left)
            start = max(end, start + 1)
        return
    theirs = preview({"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]}, by)
    spoken = [part.partition("⟧")[0] for part in theirs.split("⟦")[1:]]
    spoken = spoken[len(spoken) - len(learned(ours, by)) :]  # but for what says or answers nothing
    for one, other in zip(learned(ours, by), spoken, strict=True):
        assert one in other, kind
        lead, _, rest = other.partition(one)
        assert any(lead in prompt for prompt in asked) or re.fullmatch(r"<think>.*</think>\s*", lead, re.DOTALL), kind
        assert rest.strip() in NEXT, kind


def refusal(template: str, messages: list[Turn], tools: Any) -> str | None:
    try:
        tokens(template, messages, tools)
    except DataError as error:
        return str(error)
    return None


def remedied(name: str, message: str, messages: list[Turn], tools: Any) -> None:
    """Follow what the message advises until the conversation is taken."""
    if better := re.search(r"set data.chat_template: (\w+)", message):
        tokens(TEMPLATES[better[1]], messages, tools)
    elif key := re.search(r"data.ignore: \[(\w+)\]", message):
        kept = [{field: value for field, value in one.items() if field != key[1]} for one in messages]
        if problem := refusal(TEMPLATES[name], kept, None if key[1] == "tools" else tools):
            assert key[0] not in problem
            remedied(name, problem, kept, None if key[1] == "tools" else tools)
    elif "stand around each answer" in message:
        tokens(MARKED["qwen"], messages, tools)
    else:
        assert "set data.chat_template to one that" in message
        others = ("qwen3_training", "gptoss_training", "qwen3_5_think_training")
        assert not all(refusal(TEMPLATES[other], messages, tools) for other in others), message


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3", "gptoss"])
def test_tokens_before_an_answer_are_those_that_the_model_is_asked_with(name: str) -> None:
    """With the built-in model's tokenizer, to which the marks of these templates are many tokens."""
    if name not in TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    by = AutoTokenizer.from_pretrained(smollm2())
    by.chat_template = TEMPLATES[name]
    messages = KINDS["several turns"]
    made = tokens(by, messages)
    text = by.apply_chat_template(messages, tokenize=False)
    assert by.decode(made.ids) == text
    # The model cannot stop with another model's token, which is text to it.
    assert bool(made.notes & Note.NO_END) == (name != "qwen3")
    asked = by.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True).removesuffix("<think>\n")
    first = next(i for i, label in enumerate(made.labels) if label != IGNORED)
    assert made.ids[:first] == by(asked, add_special_tokens=False)["input_ids"]
    ends = {"qwen3": ["<|im_end|>"] * 3, "gptoss": ["<|end|>", "<|end|>", "<|return|>"]}
    for said, piece, end in zip(messages[1::2], learned(made, by), ends.get(name, [DEEPSEEKS] * 3), strict=True):
        assert piece.endswith(said["content"] + end)


# --- layouts of other templates -----------------------------------------------------------------------------------------

SAYS = "{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}{{ eos_token }}"
ASKS = "{% if add_generation_prompt %}<|model|>{% endif %}"
EOS = "<|end_of_text|>"
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
MARK = "set data.chat_template to a file with its text, in which {% generation %} and {% endgeneration %} stand around each answer"


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

PLAINLY = "{% for m in messages %}" + SAYS + "{% endfor %}" + ASKS
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

BY_MARKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|model|>{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|user|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}" + ASKS
)
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


# --- data.chat_template and data.ignore -----------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, by: Any, **options: Any) -> Any:
    return load_dataset(DataConfig(path=path, **options), by)[0]


ROW = {"messages": [user("a"), says("b")]}


def test_a_template_of_a_file_is_used_and_kept(tmp_path: Path) -> None:
    by = tokenizer(PLAINLY)
    rows = write(tmp_path / "rows.jsonl", ROW)
    (plain,) = load(rows, by)
    file = tmp_path / "mine.jinja"
    file.write_text(BY_MARKS.replace("<|model|>", "<|assistant|>"))
    (row,) = load(rows, by, chat_template=str(file))
    assert row["input_ids"] != plain["input_ids"]  # nor does it take the rows that the other template made
    assert preview(row, by) == f"<|user|>a{EOS}<|assistant|>⟦b{EOS}⟧"
    by.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    asked = again.apply_chat_template([user("a")], tokenize=False, add_generation_prompt=True)
    assert asked == f"<|user|>a{EOS}<|assistant|>"
    assert again.chat_template == file.read_text()


def test_a_template_of_the_tokenizer_s_own_by_name(tmp_path: Path) -> None:
    by = tokenizer({"default": PLAINLY, "short": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"})
    (row,) = load(write(tmp_path / "rows.jsonl", ROW), by, chat_template="short")
    assert preview(row, by) == f"a{EOS}⟦b{EOS}⟧"


def test_several_templates_of_which_none_is_for_all(tmp_path: Path) -> None:
    by = tokenizer({"long": PLAINLY, "short": PLAINLY})
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: .*multiple chat templates with no default.*set data.chat_template"
    ):
        load(write(tmp_path / "rows.jsonl", ROW), by)
    load(write(tmp_path / "rows.jsonl", ROW), by, chat_template="short")


def test_a_template_of_trl_by_name(tmp_path: Path) -> None:
    if not TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    by = tokenizer(PLAINLY)
    (row,) = load(write(tmp_path / "rows.jsonl", ROW), by, chat_template="qwen3_training")
    assert preview(row, by).endswith("<|im_start|>assistant\n⟦<think>\n\n</think>\n\nb<|im_end|>\n⟧")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jinja", None, "no such file or directory, got '{path}'"),
        ("bad.jinja", "\n{% for m in messages %}", "not a chat template, line 2: Unexpected end of template."),
        (
            "filter.jinja",
            "{{ messages | nothing }}",
            "not a chat template, line 1: No filter named 'nothing'., got '{path}'",
        ),
        ("empty.jinja", " ", "the file is empty, got '{path}'"),
        ("bytes.jinja", b"\xff\xfe", "not text in UTF-8, got '{path}'"),
        (".", None, "is a directory, got '{path}'"),
        ("a\0b.jinja", None, "embedded null byte, got "),
        ("x" * 300 + ".jinja", None, "file name too long, got "),
    ],
)
def test_a_template_that_is_none(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "rows.jsonl", ROW), tokenizer(PLAINLY), chat_template=str(path))
    assert str(error.value).startswith(f"chat_template: {message.format(path=path)}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tall", ""), ("shor", "; did you mean 'short'?"), ("qwen3-training", "; did you mean 'qwen3_tr")],
)
def test_an_unknown_name_says_what_is_known(name: str, meant: str, tmp_path: Path) -> None:
    if not TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "rows.jsonl", ROW), tokenizer({"default": PLAINLY, "short": PLAINLY}), chat_template=name)
    expected = (
        "chat_template: should be the path of a .jinja file, a name of the tokenizer's own templates (default, short)"
    )
    assert str(error.value).startswith(f"{expected} or of TRL's (such as qwen3_training), got {name!r}{meant}")
    assert bool(meant) or str(error.value).endswith(repr(name))


def test_a_template_for_rows_that_go_through_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(PLAINLY)
    rows = write(tmp_path / "rows.jsonl", {"text": "a"})
    with pytest.raises(
        DataError, match=r"rows are text, which go through no chat template; remove data\.chat_template"
    ):
        load(rows, tokenizer(PLAINLY), chat_template=str(file))


def test_what_is_ignored_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by = tokenizer(PLAINLY)
    full = [user("a", name="Ann"), {"role": "assistant", **CALLS}, user("b"), says("c", thinking="hm")]
    rows = write(tmp_path / "rows.jsonl", {"messages": full, "tools": TOOLS, "source": "x"}, ROW)
    ignore = ["name", "tool_calls", "reasoning_content", "tools", "source", "nowhere"]
    row, plain = load(rows, by, ignore=ignore)
    assert preview(row, by) == f"<|user|>a{EOS}<|model|>{EOS}<|user|>b{EOS}<|model|>⟦c{EOS}⟧"
    assert preview(plain, by) == f"<|user|>a{EOS}<|model|>⟦b{EOS}⟧"
    assert caplog.messages == [
        f"{rows}: left out as data.ignore says: 'name' (1 times), 'tool_calls' (1 times), 'reasoning_content' (1 times), "
        "'tools' (1 times), 'source' (1 times), 'nowhere' (0 times)"
    ]


def test_what_is_noted_is_told_once_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    kinds = ("earlier reasoning", "reasoning", "several turns")
    rows = write(tmp_path / "rows.jsonl", *({"messages": KINDS[kind]} for kind in kinds))
    load(rows, tokenizer(TEMPLATES["qwen3"]))
    assert caplog.messages == [
        f"{rows}: 1 of 3 rows hold reasoning in earlier answers, which the chat template writes in the last alone: those "
        "answers are learned without it"
    ]


CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
SHARED = Path(__file__).parents[3] / "shared" / "cases"


@pytest.mark.parametrize(
    ("case", "template", "expected"),
    [
        ("3-tool-calls/toolcall_empty", "qwen2_5", [CALLED, "It is 4 C.<|im_end|>"]),
        ("3-tool-calls/toolcall_null", "qwen2_5", [CALLED, "It is 4 C.<|im_end|>"]),
        ("3-tool-calls/toolcall_text", "qwen2_5", [f"Let me look.\n{CALLED}", "It is 4 C.<|im_end|>"]),
        ("7-reasoning-content/rows", "qwen3", ["<think>\ntwo and two make four\n</think>\n\n4<|im_end|>"]),
    ],
)
def test_rows_of_bug_reports(case: str, template: str, expected: list[str]) -> None:
    path = SHARED / f"{case}.jsonl"
    if not path.exists() or template not in TEMPLATES:
        pytest.skip("needs the cases beside the checkout, and trl with its chat templates")
    by = tokenizer(PLAINLY)
    with pytest.raises(
        DataError, match=r"jsonl:1: the tokenizer's chat template does not write .* so it would be lost"
    ):
        load(str(path), by)
    row, *_ = load(str(path), by, chat_template=template)
    shown = preview(row, by)
    assert [part.partition("⟧")[0] for part in shown.split("⟦")[1:]] == expected
