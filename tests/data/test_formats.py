"""Every field of a row and of a turn is used or refused by name; what is told is in test_unused_fields.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.config import DataConfig
from lisa_ds.data import load_dataset, refusals
from lisa_ds.errors import DataError
from tests.data.rows import fresh_cache, load, text, tokenizer, write
from tests.data.template_cases import TEMPLATES
from tests.data.template_cases import tokenizer as with_template
from tests.data.turns import ANSWER, ASK, CALL, TALK, A, Q, answered, said, turn

__all__ = ["fresh_cache"]

SHARED = Path(__file__).parents[3] / "shared" / "cases"

TOOL = {"type": "function", "function": {"name": "f"}}
TOLD_TOOLS = 'tools [{"type": "function", "function": {"name": "f"}}]<|end|>\n'

# --- used -----------------------------------------------------------------------------------------------------------

BARE = {"name": "f", "arguments": {"x": 1}}
AS_TEXT = {"name": "f", "arguments": '{"x": 1}'}
CALLED = 'assistant: [f {"x": 1}]<|end|>\n'


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # calls of tools, and their results
        ({"messages": [ASK, turn("assistant", None, tool_calls=[CALL])]}, Q + CALLED),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]}, Q + CALLED),
        ({"messages": [ASK, turn("assistant", "so", tool_calls=[CALL])]}, Q + 'assistant: so[f {"x": 1}]<|end|>\n'),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"function": AS_TEXT}])]}, Q + CALLED),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[BARE])]}, Q + CALLED),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"name": "f", "arguments": ""}])]}, Q + "assistant: [f {}]<|end|>\n"),
        ({"messages": [ASK, turn("assistant", None, function_call=AS_TEXT), turn("function", "1", name="f"), ANSWER]}, Q + CALLED + "tool: @f 1<|end|>\n" + A),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[CALL]), turn("tool", "1", tool_call_id="c1"), ANSWER]}, Q + CALLED + "tool: #c1 1<|end|>\n" + A),
        ({"conversations": [said("human", "q"), said("function_call", json.dumps(BARE)), said("observation", "1"), said("gpt", "a")]}, Q + CALLED + "tool: 1<|end|>\n" + A),
        ({"conversations": [said("human", "q"), said("function_call", json.dumps([BARE, BARE]))]}, Q + 'assistant: [f {"x": 1}][f {"x": 1}]<|end|>\n'),
        ({"conversations": [said("human", "q"), said("function_call", f"<think>hm</think>\n{json.dumps(BARE)}")]}, Q + 'assistant: (hm) [f {"x": 1}]<|end|>\n'),
        ({"messages": [ASK, turn("assistant", "so"), turn("tool_call", json.dumps(BARE)), turn("tool_response", "1"), ANSWER]}, Q + 'assistant: so[f {"x": 1}]<|end|>\ntool: 1<|end|>\n' + A),
        # lists of tools
        ({"messages": [ASK, ANSWER], "tools": [TOOL]}, TOLD_TOOLS + Q + A),
        ({"messages": [ASK, ANSWER], "tools": json.dumps([TOOL])}, TOLD_TOOLS + Q + A),
        ({"messages": [ASK, ANSWER], "tools": [{"name": "f"}]}, TOLD_TOOLS + Q + A),
        ({"messages": [ASK, ANSWER], "functions": [{"name": "f"}]}, TOLD_TOOLS + Q + A),
        ({"conversations": [said("human", "q"), said("gpt", "a")], "tools": '[{"name": "f"}]'}, TOLD_TOOLS + Q + A),
        ({"instruction": "q", "output": "a", "tools": '[{"name": "f"}]'}, TOLD_TOOLS + Q + A),
        ({"prompt": [ASK], "completion": [ANSWER], "tools": [TOOL]}, TOLD_TOOLS + Q + A),
        # reasoning
        (answered(reasoning_content="hm"), Q + "assistant: (hm) a<|end|>\n"),
        (answered(reasoning="hm"), Q + "assistant: (hm) a<|end|>\n"),
        (answered(thinking="hm"), Q + "assistant: (hm) a<|end|>\n"),
        (answered(thinking="hm", reasoning="hm"), Q + "assistant: (hm) a<|end|>\n"),
        ({"conversations": [said("human", "q"), said("gpt", "a", reasoning_content="hm")]}, Q + "assistant: (hm) a<|end|>\n"),
        # names of others, earlier turns, a system text
        ({"messages": [turn("developer", "s"), ASK, ANSWER]}, "system: s<|end|>\n" + Q + A),
        ({"messages": [turn("user", "q", name="ann"), ANSWER]}, "user: @ann q<|end|>\n" + A),
        ({"conversations": [ASK, ANSWER]}, Q + A),
        ({"messages": [said("human", "q"), said("gpt", "a")]}, Q + A),
        ({"messages": [ASK, ANSWER], "system": "s"}, "system: s<|end|>\n" + Q + A),
        ({"messages": [turn("system", "s"), ASK, ANSWER], "system": "s"}, "system: s<|end|>\n" + Q + A),
        ({"instruction": "q", "output": "a", "history": [["b", "c"]], "system": "s"}, "system: s<|end|>\nuser: b<|end|>\nassistant: c<|end|>\n" + Q + A),
        ({"instruction": "q", "output": "a", "history": [], "input": None}, Q + A),
        # weights that change nothing
        (answered(weight=1), Q + A),
        ({"messages": [ASK, ANSWER], "weight": 1.0}, Q + A),
    ],
)  # fmt: skip
def test_what_a_row_holds_reaches_the_template(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert text(write(tmp_path / "rows.jsonl", row), loss_on="all") == [expected]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen3", '{"name": "f", "arguments": {"x": 1}}'),
        ("llama3_1", '{"name": "f", "parameters": {"x": 1}}'),
        ("glm4moe", "<arg_key>x</arg_key>\n<arg_value>1</arg_value>"),
        ("gptoss", '<|message|>{"x": 1}<|call|>'),
        ("gemma4", "call:f{x:1}"),
        ("deepseekv3", '{"x": 1}'),  # takes text alone
    ],
)
def test_arguments_are_the_same_as_text_and_as_an_object(name: str, written: str, tmp_path: Path) -> None:
    if name not in TEMPLATES:
        pytest.skip("needs trl with its chat templates")
    calls = ({"id": "abcdefghi", "type": "function", "function": call} for call in (BARE, AS_TEXT))
    rows = [
        {
            "messages": [
                ASK,
                turn("assistant", "", tool_calls=[call]),
                turn("tool", "1", tool_call_id="abcdefghi"),
                ANSWER,
            ]
        }
        for call in calls
    ]
    made = with_template(TEMPLATES[name])
    found, _ = load_dataset(DataConfig(path=write(tmp_path / "rows.jsonl", *rows)), made)
    assert found[0] == found[1]
    assert written in made.decode(found[0]["input_ids"])


# --- refused --------------------------------------------------------------------------------------------------------

DPO = "is of a preference pair, whose answers are better and worse and not simply learned; train such rows with TRL's DPOTrainer and lisa_ds.attach (docs/huggingface.md)"
KTO = "says whether an answer is wanted (KTO), and an unwanted one must not be learned; keep the rows whose answer is wanted, or train all of them with TRL's KTOTrainer"
MEDIA = "is for a model that sees or hears, and rows are trained on as text alone; leave out"


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        # preferences
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen", DPO),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, "chosen", DPO),
        ({"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")}, "chosen", DPO),
        ({"instruction": "q", "output": "a", "rejected": "b"}, "rejected", DPO),
        ({"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}, "preferred_output", DPO),
        ({**TALK, "rejected_response": "b"}, "rejected_response", DPO),
        # wanted or not
        ({**TALK, "label": False}, "label", KTO),
        ({**TALK, "label": True}, "label", KTO),
        ({"prompt": "q", "completion": "a", "label": False}, "label", KTO),
        ({"prompt": "q", "completion": "a", "label": 0}, "label", KTO),
        ({"prompt": "q", "completion": "a", "label": "False"}, "label", KTO),
        ({"prompt": [ASK], "completion": [ANSWER], "label": True}, "label", KTO),
        ({"instruction": "q", "output": "a", "kto_tag": False}, "kto_tag", KTO),
        ({"conversations": [said("human", "q"), said("gpt", "a")], "kto_tag": True}, "kto_tag", KTO),
        # how good, how much
        ({**TALK, "reward": -1.5}, "reward", "says how good an answer is, and all are learned alike; keep the rows that are good enough"),
        ({"prompt": "q", "completion": "a", "score": 0}, "score", "says how good an answer is"),
        ({"instruction": "q", "output": "a", "rating": "2/5"}, "rating", "says how good an answer is"),
        ({**TALK, "weight": 0.5}, "weight", "is a weight of the row, and all rows are learned alike; leave out rows that should not count"),
        ({"text": "a", "sample_weight": 2}, "sample_weight", "is a weight of the row"),
        ({"instruction": "q", "output": "a", "weight": 0}, "weight", "is a weight of the row"),
        # pictures and sounds
        ({**TALK, "images": ["cat.jpg"]}, "images", MEDIA),
        ({"instruction": "q", "output": "a", "image": "cat.jpg"}, "image", MEDIA),
        ({"conversations": [said("human", "<video>q"), said("gpt", "a")], "videos": ["cat.mp4"]}, "videos", MEDIA),
        ({"prompt": "q", "completion": "a", "audio": {"path": "cat.wav"}}, "audio", MEDIA),
        ({"text": "a cat", "image": {"bytes": None, "path": "cat.jpg"}}, "image", MEDIA),
        ({"messages": [{**ASK, "images": ["cat.jpg"]}, ANSWER]}, "messages[0].images", MEDIA),
        # tokens, and masks of them
        ({"input_ids": [1, 2], "labels": [1, 2]}, "input_ids", "is of rows that were turned into tokens elsewhere, and only texts and turns are read; give the text (the class of a text is named label)"),
        ({"text": "a", "labels": [1, 2]}, "labels", "is of rows that were turned into tokens elsewhere"),
        ({**TALK, "input_ids": [1, 2]}, "input_ids", "is of rows that were turned into tokens elsewhere"),
        ({"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]}, "segments", "holds texts of which only some are learned (axolotl's input_output); give messages, each turn with a weight of 0 or 1"),
        ({"text": "qa", "segments": [{"label": True, "text": "a"}]}, "segments", "holds texts of which only some are learned"),
        ({"prompt": [ASK], "completion": [ANSWER], "completion_mask": [0, 1]}, "completion_mask", "says which tokens are learned; give each turn of messages a weight of 0 or 1 instead"),
        ({**TALK, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "changes the chat template for one row; write all rows for one template, and set data.chat_template"),
        # what others read under other names
        ({"prompt": "q", "completion": "a", "system": "s"}, "system", "goes with an instruction, not with a prompt that is a text; with data.columns, name the prompt instruction and the completion output"),
        ({"prompt": "q", "completion": "a", "history": [["b", "c"]]}, "history", "goes with an instruction"),
        ({"prompt": "q", "completion": "a", "tools": [TOOL]}, "tools", "goes with an instruction"),
        ({"prompt": "q", "completion": "a", "context": "c"}, "context", "goes before a prompt in other data sets, and is not read here; with data.columns, name the prompt instruction and the completion output, and context input"),
        ({"instruction": "q", "output": "a", "context": "c"}, "context", "belongs to the instruction in other data sets, and is not read here; set data.columns: {context: input}"),
        ({"instruction": "q", "output": "a", "system_prompt": "s"}, "system_prompt", "is read under the name of system; set data.columns: {system_prompt: system}"),
        ({"conversations": [said("human", "q"), said("gpt", "a")], "system_message": "s"}, "system_message", "is read under the name of system; set data.columns: {system_message: system}"),
        ({"prompt": "q", "completion": "a", "system_prompt": "s"}, "system_prompt", "is read under the name of system, with an instruction; with data.columns, name the prompt instruction and the completion output, and system_prompt system"),
        ({**TALK, "history": [["b", "c"]]}, "history", "holds earlier turns; put them into the list of turns"),
        ({"instruction": "q", "output": "a", "reasoning": "hm"}, "reasoning", "holds the thoughts before an answer; give messages, with reasoning_content in the answer's turn"),
        # fields of turns
        (answered(refusal="no"), "messages[1].refusal", "is what was said instead of an answer; put it into content"),
        (answered(train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}]), "messages[1].train_detail", "says which characters of a turn are learned; a turn is learned or not: give it a weight of 0 or 1"),
        (answered(loss_scale=0.5), "messages[1].loss_scale", "weighs or masks a part of a turn; a turn is learned or not: give it a weight of 0 or 1"),
        (answered(tool_plan="hm"), "messages[1].tool_plan", "holds thoughts; they are read, as text, under the name of reasoning_content"),
        (answered(reasoning_details=[{"text": "hm"}]), "messages[1].reasoning_details", "holds thoughts"),
        (answered(function_calls="f(x=1)"), "messages[1].function_calls", "holds calls; they are read under the name of tool_calls, as a list"),
        ({"messages": [turn("system", "s", functions="[]"), ASK, ANSWER]}, "messages[0].functions", "belongs to the row, beside the list of turns, under the name of tools"),
        (answered(tool_responses=[{"name": "f", "response": 1}]), "messages[1].tool_responses", "holds results of tools; give each a turn of role 'tool'"),
        (answered(channel="analysis"), "messages[1].channel", "is of a turn in Harmony's form; give its thoughts as reasoning_content and its calls as tool_calls"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(row: Any, name: str, message: str, tmp_path: Path) -> None:
    fine = {"text": "fine"} if "text" in row else None
    path = write(tmp_path / "rows.jsonl", *([fine] if fine else []), row)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:{2 if fine else 1}: {name} {message}")
    key = name.rpartition(".")[2]
    assert str(caught.value).endswith(f"; to train without it, set data.ignore: [{key}]")
    assert not [entry for entry in (tmp_path / "cache/data").glob("*") if entry.is_dir()]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK, turn("assistant", "", tool_calls="f()")]}, "messages[1].tool_calls should be a list of calls, got 'f()'"),
        ({"messages": [ASK, turn("assistant", "", tool_calls=["f()"])]}, "messages[1].tool_calls[0] should be an object, got 'f()'"),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"function": {"arguments": {}}}])]}, "messages[1].tool_calls[0].function.name should be text, got None"),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"type": "custom", "name": "f"}])]}, "messages[1].tool_calls[0].type should be 'function', got 'custom'"),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"name": "f", "arguments": '{"x": '}])]}, "messages[1].tool_calls[0].arguments should be valid JSON (Expecting value), got '{\"x\": '"),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"name": "f", "arguments": "[1]"}])]}, "messages[1].tool_calls[0].arguments should be an object, or JSON of one, got [1]"),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": float("inf")}}])]}, "messages[1].tool_calls[0].arguments should be what JSON and Unicode can say, got {'x': inf}"),
        ({"messages": [ASK, turn("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": "\ud83d"}}])]}, r"messages[1].tool_calls[0].arguments should be what JSON and Unicode can say, got {'x': '\ud83d'}"),
        ({"messages": [turn("user", "q", tool_calls=[CALL]), ANSWER]}, "messages[0].tool_calls is in a turn of role 'user'; only the assistant calls tools"),
        ({"messages": [ASK, turn("assistant", None)]}, "messages[1].content should be text, got None"),
        ({"messages": [ASK, {"role": "assistant"}]}, "messages[1] should be a turn with 'role' and 'content', got {'role': 'assistant'}"),
        ({"messages": [ASK, turn("assistant", None, tool_calls=[])]}, "messages[1].content should be text, got None"),
        ({"conversations": [said("human", "q"), said("function_call", "f(x)")]}, "conversations[1].value should be valid JSON (Expecting value), got 'f(x)'"),
        ({"conversations": [said("human", "q"), said("function_call", "")]}, "conversations[1].value should be an object, got None"),
        ({**TALK, "tools": "f"}, "tools should be valid JSON (Expecting value), got 'f'"),
        ({**TALK, "tools": {"name": "f"}}, "tools should be a list of tools, or JSON of one, got {'name': 'f'}"),
        ({**TALK, "tools": ["f"]}, "tools[0] should be a tool with type 'function', got 'f'"),
        ({**TALK, "tools": [{"type": "function", "function": {}}]}, "tools[0] should be a tool with a function that has a name, got {'type': 'function', 'function': {}}"),
        ({**TALK, "tools": '[{"name": "f", "name": "g"}]'}, "tools should be valid JSON (the key 'name' is there twice in one object), got "),
        (answered(reasoning_content=["hm"]), "messages[1].reasoning_content should be text, got ['hm']"),
        (answered(reasoning="hm", thinking="ho"), "messages[1].reasoning and thinking differ, and both are the thoughts of one turn; keep one"),
        (answered(weight=0.5), "messages[1].weight should be 0 or 1, false or true, got 0.5"),
        (answered(train="no"), "messages[1].train should be 0 or 1, false or true, got 'no'"),
        (answered(weight=1, loss=False), "messages[1].weight and loss contradict each other; keep one"),
        ({"messages": [{**ASK, "train": True}, ANSWER]}, "messages[0].train asks to learn a turn of role 'user'; only the assistant's are: remove it"),
        ({"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ANSWER]}, "messages[0].content[0].type is 'image_url', and only text is read; give thoughts as reasoning_content and calls as tool_calls, and leave out rows about pictures and sounds"),
        ({"messages": [turn("user", [{"type": "text"}]), ANSWER]}, "messages[0].content[0].text should be text, got None"),
        ({"messages": [turn("user", ["q"]), ANSWER]}, "messages[0].content[0] should be an object, got 'q'"),
        ({"messages": [turn("user", "<image>q"), ANSWER], "images": []}, "<image> stands for what a text model does not see; leave out the row, or remove it from the text"),
        ({"text": "a <video>", "videos": None}, "<video> stands for what a text model does not see"),
        ({"messages": [turn("system", "s"), ASK, ANSWER], "system": "t"}, "system and the conversation's own system turn differ; keep one"),
        ({"instruction": "q", "output": "a", "history": ["b"]}, "history[0] should be a question and an answer, got 'b'"),
        ({"instruction": "q", "output": "a", "history": "b"}, "history should be a list of [question, answer], got 'b'"),
        ({"messages": [turn("bot", "q")]}, "messages[0].role should be one of system, developer, user, human, assistant, gpt, function_call, tool_call, tool, function, observation, tool_response, got 'bot'"),
    ],
)  # fmt: skip
def test_what_is_malformed_names_file_line_and_field(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:1: {message}")


def test_a_second_text_of_a_pair_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a", "label": 1, "sentence2": "b"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: sentence2 is the second text of a pair; join both in text"):
        load_dataset(DataConfig(path=path), tokenizer(), task="sequence_classification")


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"instruction": "q", "output": "a", "context": "c"}, {"columns": {"context": "input"}}),
        ({"prompt": "q", "completion": "a", "context": "c"}, {"columns": {"prompt": "instruction", "completion": "output", "context": "input"}}),
        ({**TALK, "system_prompt": "s"}, {"columns": {"system_prompt": "system"}}),
        ({"prompt": "q", "completion": "a", "system": "s"}, {"columns": {"prompt": "instruction", "completion": "output"}}),
        ({**TALK, "label": False}, {"ignore": ["label"]}),
        (answered(refusal="no"), {"ignore": ["refusal"]}),
        (answered(images=["cat.jpg"]), {"ignore": ["images"]}),
        ({**TALK, "images": ["cat.jpg"], "reward": 1}, {"ignore": ["images", "reward"]}),
    ],
)  # fmt: skip
def test_the_remedies_work(row: Any, options: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row, {k: v for k, v in row.items() if k not in ("context", "system_prompt")})
    with pytest.raises(DataError):
        load(path)
    assert len(load(path, **options)) == 2


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        ("3-tool-calls/toolcall_empty", '[get_weather {"city": "Oslo"}]'),
        ("3-tool-calls/toolcall_null", '[get_weather {"city": "Oslo"}]'),
        ("3-tool-calls/toolcall_text", 'Let me look.[get_weather {"city": "Oslo"}]'),
        ("5-kto-label-false/rows", DataError("label says whether an answer is wanted (KTO)")),
        ("6-images/rows", DataError("images is for a model that sees or hears")),
        ("7-reasoning-content/rows", "(two and two make four) 4"),
    ],
)
def test_cases_of_users(case: str, outcome: Any) -> None:
    path = SHARED / f"{case}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the cases beside the checkout")
    if isinstance(outcome, DataError):
        with pytest.raises(DataError) as caught:
            load(path)
        assert f"{path}:1: {outcome}" in str(caught.value)
    else:
        assert outcome in text(path)[0]


def test_documentation_lists_what_is_refused() -> None:
    told = (Path(__file__).parents[2] / "docs/data.md").read_text()
    names = {name for refusal in (*refusals._OF_ROWS, *refusals._OF_TURNS) for name in refusal.names}
    assert sorted(name for name in names if f"`{name}`" not in told) == []
