"""Answers for a judge, and samples before and after training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from lisa_ds import jsonl
from lisa_ds.cli import main
from lisa_ds.evaluate import answers, rows
from lisa_ds.evaluate.answers import Question, answer_questions, read_questions
from lisa_ds.models import answer
from lisa_ds.report import runs
from tests import tiny
from tests.evaluate.test_subject import RUN, write_adapter, write_run

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
    {"question_id": 121, "category": "coding", "turns": ["Add.", "Again."], "reference": ["x", "y"]},
    {"question_id": 7, "category": "cooking", "turns": ["Boil."]},
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    tiny.write_model(tmp_path / "base")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return tmp_path


def asked(*words: str) -> int:
    limit = ["--max-new-tokens", "6"]
    return main(["evaluate", "base", "--answers", "questions.jsonl", "--out", "answers.jsonl", *limit, *words])


def read(path: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_answers_have_the_judge_s_format_and_each_turn_sees_those_before(place: Path) -> None:
    assert asked("--model-id", "mine") == 0
    found = read()
    assert [each["question_id"] for each in found] == [81, 121, 7]
    for each, question in zip(found, QUESTIONS, strict=True):
        assert set(each) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (each["model_id"], type(each["tstamp"])) == ("mine", float)
        (choice,) = each["choices"]
        assert set(choice) == {"index", "turns"}
        assert (choice["index"], len(choice["turns"])) == (0, len(question["turns"]))
    assert len({each["answer_id"] for each in found}) == 3
    # The greedy one by another way: the conversation as the template writes it.
    first, second = found[1]["choices"][0]["turns"]
    tokenizer, model = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained("base")
    text = "<|user|>Add.<|end|><|assistant|>"
    for said in (first, second):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == said
        text += f"{said}<|end|><|user|>Again.<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("category", "temperature"),
    [
        *(("writing", 0.7), ("roleplay", 0.7), ("stem", 0.1), ("humanities", 0.1), ("cooking", 0.7)),
        *((name, 0.0) for name in ("extraction", "math", "coding", "reasoning")),
    ],
)
def test_temperatures_are_those_of_mt_bench(category: str, temperature: float) -> None:
    assert Question(1, category, ("x",)).temperature == temperature
    assert Question(1, category, ("x",), 0.3).temperature == 0.3


def test_what_is_answered_is_not_asked_again_and_the_rest_is_answered_alike(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked() == 0
    whole = read()
    Path("answers.jsonl").write_text(json.dumps(whole[1]) + "\n")
    torch.manual_seed(5)
    assert asked() == 0
    again = read()
    assert "1 of 3 questions are answered already in answers.jsonl" in capsys.readouterr().out
    assert again[1] == whole[1]  # with its id and time
    assert again[0]["answer_id"] != whole[0]["answer_id"]
    assert [each["choices"] for each in again] == [each["choices"] for each in whole]


def test_what_unicode_breaks_lines_at_is_text_in_an_answer(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    monkeypatch.setattr(answers, "reply", lambda *args, **settings: text)
    assert asked() == 0
    whole = Path("answers.jsonl").read_text()
    assert "\u2028" in whole
    assert asked() == 0
    assert "3 of 3 questions are answered already" in capsys.readouterr().out
    assert Path("answers.jsonl").read_text() == whole
    assert [fields["choices"][0]["turns"][0] for _, fields in jsonl.read(Path("answers.jsonl"))] == [text] * 3
    jsonl.write(Path("samples.jsonl"), [{"prompt": text, "before": text, "after": text}])
    assert list(runs._samples(Path("samples.jsonl"))) == [runs.Sample(text, text, text)]
    jsonl.write(Path("train.jsonl"), [{"question": text, "answer": f"{text}\n#### 1"}] * 2)
    assert rows.gsm8k(data_dir=".", num_examples=1)["asked"]["question"] == [text]


def test_a_run_that_is_killed_keeps_what_it_has_answered(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), tiny.tokenizer()
    questions = read_questions(Path("questions.jsonl"))
    said = []

    def reply(model: Any, tokenizer: Any, turns: Any, **settings: Any) -> str:
        if len(said) == 3:
            raise KeyboardInterrupt
        said.append(turns[-1]["content"])
        return "yes"

    monkeypatch.setattr(answers, "reply", reply)
    with pytest.raises(KeyboardInterrupt):
        answer_questions(model, tokenizer, questions, Path("answers.jsonl"), model_id="base", tell=lambda text: None)
    assert said == ["Write.", "Shorter.", "Add."]
    assert [each["question_id"] for each in read()] == [81]  # not half of the second


def test_drawn_tokens_depend_on_the_question_and_are_not_greedy(place: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), tiny.tokenizer()
    questions = [Question(key, category, ("Say.",)) for key, category in ((1, "writing"), (2, "writing"), (3, "math"))]
    answer_questions(
        model, tokenizer, questions, Path("a.jsonl"), model_id="x", max_new_tokens=12, tell=lambda text: None
    )
    one, two, greedy = (each["choices"][0]["turns"][0] for each in read("a.jsonl"))
    assert greedy == answer(model, tokenizer, "Say.", 12)
    assert len({one, two, greedy}) == 3


def test_a_checkpoint_s_settings_for_generation_are_set_aside(place: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), tiny.tokenizer()
    question = Question(1, "writing", ("Say.",))

    def said() -> list[str]:
        Path("a.jsonl").unlink(missing_ok=True)
        answer_questions(
            model, tokenizer, [question], Path("a.jsonl"), model_id="x", max_new_tokens=12, tell=lambda text: None
        )
        return [read("a.jsonl")[0]["choices"][0]["turns"][0], answer(model, tokenizer, "Say.", 12)]

    plain = said()
    own = model.generation_config
    own.update(min_p=0.9, repetition_penalty=5.0, typical_p=0.1, suppress_tokens=list(range(4, 200)))
    assert said() == plain
    assert model.generation_config is own  # as it was
    ids = tokenizer("Say.", return_tensors="pt").input_ids
    free = GenerationConfig(eos_token_id=1, pad_token_id=0)
    bound = model.generate(ids, max_new_tokens=12, do_sample=False)
    model.generation_config = free
    assert not torch.equal(bound, model.generate(ids, max_new_tokens=12, do_sample=False))  # the control


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"questions.jsonl": "{}\n"}, "questions.jsonl:1: question_id should be a number or a text, got None"),
        ({"questions.jsonl": "\n"}, "questions.jsonl: holds no questions"),
        (
            {"questions.jsonl": json.dumps({**QUESTIONS[0], "required_temperature": -1}) + "\n"},
            "questions.jsonl:1: required_temperature should be a number, 0 or more, got -1",
        ),
        ({"questions.jsonl": "[1]\n"}, "questions.jsonl:1: should be an object, got list"),
        ({"questions.jsonl": "{\n"}, "questions.jsonl:1: not valid JSON: "),
        (
            {"questions.jsonl": json.dumps({**QUESTIONS[0], "turns": []}) + "\n"},
            "questions.jsonl:1: turns should be a list of texts, got []",
        ),
        (
            {"questions.jsonl": (json.dumps(QUESTIONS[0]) + "\n") * 2},
            "questions.jsonl:2: question_id 81 is given twice",
        ),
        (
            {"answers.jsonl": '{"question_id": 81, "model_id": "other", "choices": []}\n'},
            "--out: answers.jsonl:1 is an answer of 'other', and this model is 'base'; choose another file, or say --model-id",
        ),
        (
            {"answers.jsonl": '{"value": 1}\n'},
            "answers.jsonl:1: is no answer, and the file is not written over; choose",
        ),
        (
            {"base/chat_template.jinja": ""},
            "--answers: the tokenizer of base has no chat template to put several turns",
        ),
    ],
)
def test_what_is_wrong_with_questions_or_answers_is_said_before_any_weight_is_read(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: dict[str, str],
    message: str,
) -> None:
    for name, text in spoil.items():
        (place / name).write_text(text)
    monkeypatch.setattr("lisa_ds.evaluate.opened.load_model", lambda *args: pytest.fail("weights were read"))
    assert asked() == 2
    assert capsys.readouterr().err.startswith(f"lisa-ds: error: {message}")
    for name, text in spoil.items():
        assert (place / name).read_text() == text


def test_samples_are_answers_of_the_base_and_of_the_trained_model(place: Path) -> None:
    run = write_run(place)
    torch.manual_seed(3)
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    torch.nn.init.normal_(trained.lm_head.weight)
    trained.save_pretrained(run / "model")
    Path("prompts.txt").write_text("1 + 1?\n\nWhy?\n")
    assert main(["evaluate", "runs/one", "--samples", "prompts.txt", "--max-new-tokens", "5"]) == 0
    lines = read("runs/one/samples.jsonl")
    base = AutoModelForCausalLM.from_pretrained("base")
    assert lines == [
        {
            "prompt": prompt,
            "before": answer(base, tiny.tokenizer(), prompt, 5),
            "after": answer(trained, tiny.tokenizer(), prompt, 5),
        }
        for prompt in ("1 + 1?", "Why?")
    ]
    assert all(list(line) == ["prompt", "before", "after"] for line in lines)
    assert lines[0]["before"] != lines[0]["after"]
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "Why\nnot?"}) + "\n")
    assert main(["evaluate", "runs/one", "--samples", "prompts.jsonl", "--max-new-tokens", "5"]) == 0
    assert [line["prompt"] for line in read("runs/one/samples.jsonl")] == ["Why\nnot?"]


@pytest.mark.parametrize("gone", [False, True])
def test_before_training_a_run_on_a_saved_adapter_was_that_adapter(
    place: Path, capsys: pytest.CaptureFixture[str], gone: bool
) -> None:
    write_adapter(place)
    write_run(place, {**RUN, "method": "lora", "lora": {"adapter": "adapter"}})
    shutil.rmtree("runs/one/model")
    shutil.copytree("adapter", "runs/one/model")
    weights = {name: value + 0.5 for name, value in load_file("adapter/adapter_model.safetensors").items()}
    save_file(weights, "runs/one/model/adapter_model.safetensors", {"format": "pt"})
    Path("prompts.txt").write_text("1 + 1?\n")
    if gone:
        shutil.rmtree("adapter")
        assert main(["evaluate", "runs/one", "--samples", "prompts.txt"]) == 2
        assert capsys.readouterr().err.startswith(
            "lisa-ds: error: --samples: the run went on with the adapter in 'adapter', which is not there (looked from "
        )
        return
    assert main(["evaluate", "runs/one", "--samples", "prompts.txt", "--max-new-tokens", "5"]) == 0
    said = {}
    for when, name in (("before", "adapter"), ("after", "runs/one/model")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), name)
        said[when] = answer(model, tiny.tokenizer(), "1 + 1?", 5)
    bare = answer(AutoModelForCausalLM.from_pretrained("base"), tiny.tokenizer(), "1 + 1?", 5)
    assert read("runs/one/samples.jsonl") == [{"prompt": "1 + 1?", **said}]
    assert len({bare, *said.values()}) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("base", "x", "--samples: takes the output directory of a run, whose samples it holds, got base"),
        ("runs/one", "\n", "prompts.txt: holds no prompts"),
        (
            "runs/none",
            "x",
            "--samples: runs/none/records.jsonl does not say which model was trained; name the run's file",
        ),
    ],
)
def test_what_is_wrong_with_samples(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    write_run(place)
    tiny.write_model(place / "runs/none/model")
    Path("prompts.txt").write_text(text)
    assert main(["evaluate", name, "--samples", "prompts.txt"]) == 2
    assert capsys.readouterr().err.startswith(f"lisa-ds: error: {message}")
