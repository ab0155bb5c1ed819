"""Chat templates as models come with them, masked as their training twins are or refused with a remedy that works."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from lisa_ds.data import preview
from lisa_ds.data.answers import Note
from lisa_ds.data.tokenise import IGNORED, Tokens
from lisa_ds.errors import DataError
from tests.data.rows import fresh_cache
from tests.data.template_cases import (
    DEEPSEEKS,
    KINDS,
    ORIGINALS,
    TEMPLATES,
    TOOLS,
    WITH_TOOLS,
    Turn,
    learned,
    tokenizer,
    tokens,
)
from tests.train.builtin import smollm2

__all__ = ["fresh_cache"]

MARKED = {"qwen": TEMPLATES.get("qwen3_training", "")}

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
