"""Tasks of lm-evaluation-harness: ours on local files, and what is said of those whose data is elsewhere."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisa_ds import records
from lisa_ds.cli import main
from lisa_ds.errors import DataError
from lisa_ds.evaluate import harness, rows
from tests import tiny
from tests.train.builtin import shared_data, smollm2

PUBMED = {
    str(i): {
        "QUESTION": f"Does {i} help?",
        "CONTEXTS": [f"We gave {i}.", "It was measured."],
        "LONG_ANSWER": "It may.",
        "final_decision": ("yes", "no", "maybe")[i % 3],
    }
    for i in range(12)
}


def problem(i: int) -> dict[str, str]:
    return {
        "question": f"Ann has {i} apples and buys {i + 1000}. How many?",
        "answer": f"She has {i} + {i + 1000} = <<{i}+{i + 1000}={2 * i + 1000}>>{2 * i + 1000}.\n#### {2 * i + 1000:,}",
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    tiny.write_model(tmp_path / "base")
    (tmp_path / "data/pubmedqa").mkdir(parents=True)
    tiny.write_rows(tmp_path / "data/train.jsonl", problem)
    (tmp_path / "data/pubmedqa/ori_pqal.json").write_text(json.dumps(PUBMED))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 1 = 3. So they earn $1,203.50.", "1203.50"),
        ("The answer is 72.", "72"),
        ("It falls by -5", "-5"),
        ("half of 3 is .5", ".5"),
        ("7, 8, 9", "9"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert rows.last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "right"), [("#### 1,010", 1.0), ("So 1010.00 apples.", 1.0), ("1010, or rather 7", 0.0), ("many", 0.0)]
)
def test_an_answer_is_right_if_its_last_number_is(answer: str, right: float) -> None:
    assert rows.score_gsm8k({"number": "1,010"}, [answer]) == {"exact_match": right}


def test_worked_examples_come_from_train_and_have_no_calculator_s_marks(place: Path) -> None:
    found = rows.gsm8k(data_dir="data", num_examples=3)
    assert found["examples"]["question"] == [problem(i)["question"] for i in range(3)]
    assert found["asked"]["question"] == [problem(i)["question"] for i in range(3, 24)]
    assert found["examples"][1]["worked"] == "She has 1 + 1001 = 1002. The answer is 1,002."
    tiny.write_rows(place / "data/test.jsonl", lambda i: problem(i + 500), count=4)
    assert rows.gsm8k(data_dir="data")["asked"]["number"] == ["2,000", "2,002", "2,004", "2,006"]


def test_the_official_test_of_pubmedqa_is_asked_where_it_is_named(place: Path) -> None:
    found = rows.pubmedqa(data_dir="data")
    assert (len(found["examples"]), len(found["asked"])) == (5, 7)
    assert found["examples"][0] == {
        "abstract": "We gave 0.\nIt was measured.",
        "question": "Does 0 help?",
        "decision": "yes",
    }
    (place / "data/pubmedqa/test_ground_truth.json").write_text(json.dumps({"0": "yes", "3": "yes"}))
    found = rows.pubmedqa(data_dir="data/pubmedqa", num_examples=4)
    assert found["asked"]["question"] == ["Does 0 help?", "Does 3 help?"]
    assert found["examples"]["question"] == [f"Does {i} help?" for i in (1, 2, 4, 5)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.jsonl", '{"question": "1?"}\n', "data/train.jsonl:1: answer should be a text, got None"),
        (
            "train.jsonl",
            '{"question": "1?", "answer": "so 1"}\n',
            "data/train.jsonl:1: answer should end with '#### ' and a number, got 'so 1'",
        ),
        ("train.jsonl", "\n{\n", "data/train.jsonl:2: not valid JSON: "),
        (
            "train.jsonl",
            json.dumps(problem(1)) + "\n",
            "data/train.jsonl: has 1 rows, too few for 8 examples and a row",
        ),
    ],
)
def test_a_malformed_file_is_named(place: Path, file: str, text: str, message: str) -> None:
    (place / "data" / file).write_text(text)
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        rows.gsm8k(data_dir="data")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"final_decision": "perhaps"}, "1: final_decision should be one of yes, no, maybe, got 'perhaps'"),
        ({"CONTEXTS": "one"}, "1: CONTEXTS should be a list of texts"),
    ],
)
def test_a_malformed_row_of_pubmedqa_is_named(place: Path, changed: dict[str, Any], message: str) -> None:
    (place / "data/pubmedqa/ori_pqal.json").write_text(json.dumps({**PUBMED, "1": {**PUBMED["1"], **changed}}))
    with pytest.raises(DataError, match=f"^data/pubmedqa/ori_pqal.json: {message}$"):
        rows.pubmedqa(data_dir="data")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", ","], "--tasks: should be names with commas between, such as gsm8k_cot_local,pubmedqa_5shot\n"),
        (
            ["--tasks", "pubmedqa_5shot"],
            "--tasks: pubmedqa_5shot reads local files; say where they are, --data-dir DIR\n",
        ),
        (["--tasks", "mmlu", "--data-dir", "data"], "--data-dir: is read by gsm8k_cot_local and pubmedqa_5shot alone,"),
        (["--tasks", "pubmedqa_5shot", "--data-dir", "none"], "--data-dir: no such directory, got 'none'"),
        (
            ["--tasks", "pubmedqa_5shot", "--data-dir", "base"],
            "--data-dir: neither base/ori_pqal.json nor base/pubmedqa/ori_pqal.json is there\n",
        ),
        pytest.param(
            ["--tasks", "winogrand"],
            "--tasks: there is no task 'winogrand' in lm_eval; did you mean winogrande",
            marks=pytest.mark.more,
        ),
        (
            ["--tasks", "winogrande"],
            "--tasks: the data of winogrande is on the Hugging Face hub and could not be loaded: ConnectionError: Couldn't reach ",
        ),
    ],
)
def test_what_is_wrong_with_tasks_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    if (
        "lm_eval" in message or "hub" in message or "neither" in message
    ):  # found by the harness, or while it reads the rows
        pytest.importorskip("lm_eval")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lisa_ds.evaluate.opened.load_model", lambda *args: pytest.fail("weights were read"))
    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    assert main(["evaluate", "base", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lisa-ds: error: {message}")
    assert error.count("\n") == 1


def test_what_to_install_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["evaluate", "base", "--tasks", "mmlu"]) == 2
    assert capsys.readouterr().err == (
        "lisa-ds: error: --tasks: needs lm_eval, which is not installed; pip install 'lisa-ds[evaluate]'\n"
    )


def prompt_of(tokenizer: Any, turns: list[tuple[str, str]], question: str, *, chat: bool) -> str:
    """A prompt with worked examples, by another way than the harness's."""
    if not chat:
        return "".join(f"{asked} {said}\n\n" for asked, said in turns) + question
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": question})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def greedy(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids.shape[1] :]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text.partition("Question:")[0]


def asked_gsm8k(name: str, data_dir: str, shots: int, limit: int, *, chat: bool) -> records.Record:
    words = ["--tasks", "gsm8k_cot_local", "--data-dir", data_dir, "--num-fewshot", str(shots), "--limit", str(limit)]
    words += ["--dtype", "float32", "--out", "found.jsonl", *(["--apply-chat-template"] if chat else [])]
    Path("found.jsonl").unlink(missing_ok=True)
    assert main(["evaluate", name, *words]) == 0
    (record,) = records.read("found.jsonl")
    assert record.name == "gsm8k_cot_local/exact_match"
    assert (record.n, record.settings["num_fewshot"], record.settings["limit"]) == (limit, shots, limit)
    assert "lm_eval" in record.versions
    return record


def answered_by_hand(name: str, data_dir: str, shots: int, limit: int, *, chat: bool) -> dict[str, tuple[str, str]]:
    """Of each question that is asked, the greedy answer and the right number, by another way than the harness's."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(name),
    )
    lines = [json.loads(line) for line in Path(data_dir, "train.jsonl").read_text().splitlines()[: shots + limit]]
    turns = []
    for row in lines[:shots]:
        worked, number = re.sub("<<.*?>>", "", row["answer"]).split("####")
        turns.append((f"Question: {row['question']}\nAnswer:", f"{worked.strip()} The answer is {number.strip()}."))
    found = {}
    for row in lines[shots:]:
        prompt = prompt_of(tokenizer, turns, f"Question: {row['question']}\nAnswer:", chat=chat)
        found[row["question"]] = (greedy(model, tokenizer, prompt, 400), row["answer"].split("####")[1])
    return found


def last(text: str) -> float | None:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def compare_answers(monkeypatch: pytest.MonkeyPatch, name: str, data_dir: str, limit: int, *, chat: bool) -> None:
    seen: dict[str, str] = {}
    own = rows.score_gsm8k

    def score(row: Any, results: Any) -> dict[str, float]:
        seen[row["question"]] = results[0]
        return own(row, results)

    monkeypatch.setattr(rows, "score_gsm8k", score)
    record = asked_gsm8k(name, data_dir, 2, limit, chat=chat)
    by_hand = answered_by_hand(name, data_dir, 2, limit, chat=chat)
    assert [last(seen[question]) for question in by_hand] == [last(text) for text, _ in by_hand.values()]
    assert any(last(text) is not None for text in seen.values())
    assert record.value == sum(last(text) == last(number) for text, number in by_hand.values()) / limit


@pytest.mark.parametrize("chat", [False, True])
def test_gsm8k_asks_what_it_says_and_counts_what_is_right(
    place: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """Of a model that knows some of the answers: it reads the number off the question."""
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    seen: list[str] = []

    def generate_until(self: Any, requests: Any) -> list[str]:
        seen.extend(request.args[0] for request in requests)
        numbers = [int(re.findall(r"has (\d+) apples", request.args[0])[-1]) for request in requests]
        return [f"Add {i} twice: {2 * i + 1000 if i % 4 else 7:,}." for i in numbers]

    monkeypatch.setattr(lm_eval.HFLM, "generate_until", generate_until)
    record = asked_gsm8k("base", "data", 2, 10, chat=chat)
    asked = range(2, 12)
    assert record.value == sum(bool(i % 4) for i in asked) / 10
    assert record.settings["stderr"] == pytest.approx((record.value * (1 - record.value) / 9) ** 0.5)
    turns = [
        (f"Question: {problem(i)['question']}\nAnswer:", rows.gsm8k(data_dir="data")["examples"][i]["worked"])
        for i in range(2)
    ]
    wanted = [
        prompt_of(tiny.tokenizer(), turns, f"Question: {problem(i)['question']}\nAnswer:", chat=chat) for i in asked
    ]
    assert seen == wanted


@pytest.mark.parametrize("chat", [False, True])
def test_pubmedqa_takes_the_likeliest_of_three_answers(place: Path, chat: bool) -> None:
    pytest.importorskip("lm_eval")
    words = ["--tasks", "pubmedqa_5shot", "--data-dir", "data", "--dtype", "float32", "--out", "found.jsonl"]
    assert main(["evaluate", "base", *words, *(["--apply-chat-template"] if chat else [])]) == 0
    (record,) = records.read("found.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), tiny.tokenizer()
    texts = {key: f"Abstract: We gave {key}.\nIt was measured.\nQuestion: Does {key} help?\nAnswer:" for key in PUBMED}
    turns = [(texts[key], PUBMED[key]["final_decision"]) for key in list(PUBMED)[:5]]
    right = 0
    for key in list(PUBMED)[5:]:
        prompt = prompt_of(tokenizer, turns, texts[key], chat=chat)  # type: ignore[arg-type]
        likely = []
        for choice in rows.DECISIONS:
            ids = tokenizer(prompt + ("" if chat else " ") + choice, add_special_tokens=False).input_ids
            start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            likely.append(-F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").item())
        right += rows.DECISIONS[likely.index(max(likely))] == PUBMED[key]["final_decision"]
    assert (record.name, record.value, record.n) == ("pubmedqa_5shot/acc", pytest.approx(right / 7), 7)
    assert record.settings["num_fewshot"] == 5


def test_a_group_has_a_score_of_its_own_beside_its_tasks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MMLU is one: here of two tasks on the same rows."""
    pytest.importorskip("lm_eval")
    text = (Path(rows.__file__).parent / "tasks/pubmedqa_5shot.yaml").read_text()
    for name, shots in (("few", 2), ("some", 5)):
        more = text.replace("task: pubmedqa_5shot", f"task: {name}").replace("num_fewshot: 5", f"num_fewshot: {shots}")
        (place / f"{name}.yaml").write_text(more)
    (place / "both.yaml").write_text("group: both\ntask: [few, some]\naggregate_metric_list: [{metric: acc}]\n")
    monkeypatch.setattr(harness, "_TASKS", place)
    assert main(["evaluate", "base", "--tasks", "both", "--data-dir", "data", "--out", "found.jsonl"]) == 0
    found = {record.name: record for record in records.read("found.jsonl")}
    assert found.keys() == {"both/acc", "few/acc", "some/acc"}
    assert found["both/acc"].n == found["few/acc"].n + found["some/acc"].n == 14
    assert found["both/acc"].value == pytest.approx((found["few/acc"].value + found["some/acc"].value) / 2)
    assert [found[f"{name}/acc"].settings["num_fewshot"] for name in ("few", "some")] == [2, 5]


@pytest.mark.nightly
@pytest.mark.parametrize("chat", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_smollm2_on_gsm8k_scores_as_its_generations_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    pytest.importorskip("lm_eval")
    name, data_dir = smollm2(), str(shared_data("gsm8k"))
    monkeypatch.chdir(tmp_path)
    compare_answers(monkeypatch, name, data_dir, 10, chat=chat)
