"""The held-out loss is the sum over all labelled tokens by their number, whatever the batches and ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig
from transformers import LlamaForSequenceClassification as Classifier

from lisa_ds import data, records
from lisa_ds.cli import main
from lisa_ds.evaluate.loss import measure
from lisa_ds.evaluate.opened import open_subject
from lisa_ds.evaluate.subject import find, settings
from tests import programs, tiny
from tests.ranks import run_ranks
from tests.training_runs import launch, write_run

EXACT = 1e-6
"""Relative: fp32 kernels of other shapes round otherwise, one in 1.7e7 at a time."""


def lengths(i: int) -> dict[str, str]:
    """Rows of very different lengths, so that a mean over batches is another number."""
    return {"instruction": f"{i} + {i}?", "input": "", "output": f"It is {i + i}." * (1 + 5 * (i % 4))}


def classes(i: int) -> dict[str, str]:
    return {"text": "so " * (i % 7) + str(i), "label": ("late", "early", "never")[i % 3]}


CASES: dict[str, tuple[Any, list[str]]] = {
    "conversations": (lengths, ["data.eval_path=rows.jsonl"]),
    "a held-out part": (lengths, ["data.path=rows.jsonl", "data.eval_fraction=0.5", "data.max_length=40"]),
    "packed texts": (tiny.text, ["data.eval_path=rows.jsonl", "data.packing=true", "data.max_length=32"]),
}


def opened(words: list[str], name: str = "model") -> Any:
    subject = find(name)
    return open_subject(subject, settings(subject, None, words), any_text=False)


def by_rows(model: Any, rows: Any) -> tuple[float, int]:
    """The same by another way: each row alone, unpadded, through the model's whole forward."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    return total, count


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_the_mean_over_tokens_computed_row_by_row(place: Path, case: str, side: str) -> None:
    make, words = CASES[case]
    tiny.write_rows(place / "rows.jsonl", make)
    saved = json.loads((place / "model/tokenizer_config.json").read_text())
    (place / "model/tokenizer_config.json").write_text(json.dumps({**saved, "padding_side": side}))
    assert AutoTokenizer.from_pretrained("model").padding_side == side
    found = opened(words)
    rows = data.load_held_out(found.config.data, found.tokenizer)
    total, count = by_rows(AutoModelForCausalLM.from_pretrained("model"), rows)
    model = found.load("float32")
    for batch_size in (1, 5, 100):
        loss = measure(model, rows, data.collator(found.tokenizer), task="causal_lm", batch_size=batch_size)
        assert loss.loss == pytest.approx(total / count, rel=EXACT), batch_size
        assert (loss.tokens, loss.rows) == (count, len(rows))
        assert loss.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_mean_over_batches_would_be_seen(place: Path) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths)
    found = opened(["data.eval_path=rows.jsonl"])
    rows = data.load_held_out(found.config.data, found.tokenizer)
    model = AutoModelForCausalLM.from_pretrained("model")
    sums = [by_rows(model, [row]) for row in rows]
    total, count = by_rows(model, rows)
    mean_of_means = sum(loss / number for loss, number in sums) / len(sums)
    assert mean_of_means != pytest.approx(total / count, rel=1e-4)


def test_of_a_model_whose_logits_are_not_shown_to_be_free_of_their_neighbours(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths)
    found = opened(["data.eval_path=rows.jsonl"])
    rows = data.load_held_out(found.config.data, found.tokenizer)
    total, count = by_rows(AutoModelForCausalLM.from_pretrained("model"), rows)
    monkeypatch.setattr("lisa_ds.evaluate.loss.LabelledLogits.of", lambda *args, **kwargs: None)
    model = found.load("float32")
    loss = measure(model, rows, data.collator(found.tokenizer), task="causal_lm", batch_size=5)
    assert loss.loss == pytest.approx(total / count, rel=EXACT)


def test_the_hooks_are_gone_afterwards(place: Path) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths)
    found = opened(["data.eval_path=rows.jsonl"])
    rows = data.load_held_out(found.config.data, found.tokenizer)
    model = found.load("float32")
    measure(model, rows, data.collator(found.tokenizer), task="causal_lm", batch_size=5)
    assert not model.lm_head._forward_pre_hooks
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_prints_and_records_it(place: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths)
    words = ["data.eval_path=rows.jsonl", "--dtype", dtype, "--out", "found.jsonl", "--batch-size", "3"]
    assert main(["evaluate", "model", *words]) == 0
    found = opened(words[:1])
    rows = data.load_held_out(found.config.data, found.tokenizer)
    total, count = by_rows(AutoModelForCausalLM.from_pretrained("model"), rows)
    read = {record.name: record for record in records.read("found.jsonl")}
    assert read.keys() == {"held_out_loss_per_token", "held_out_perplexity"}
    loss = read["held_out_loss_per_token"]
    assert loss.value == pytest.approx(total / count, rel=EXACT if dtype == "float32" else 2e-2)
    assert (loss.value == pytest.approx(total / count, rel=EXACT)) == (dtype == "float32")
    assert (loss.variant, loss.unit, loss.n, loss.settings["dtype"]) == ("model", "nats", count, dtype)
    assert f"held-out loss per token {loss.value:.6f}, perplexity" in capsys.readouterr().out


def test_what_is_not_finite_is_told_and_not_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths)
    model = AutoModelForCausalLM.from_pretrained("model")
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    model.save_pretrained("model")
    assert main(["evaluate", "model", "data.eval_path=rows.jsonl", "--out", "found.jsonl"]) == 0
    said = capsys.readouterr().out
    assert (
        "not written, because JSON has no word for what is not a finite number: held_out_loss_per_token, held_out_perplexity\n"
        in said
    )
    assert "wrote" not in said
    assert not Path("found.jsonl").exists()


def test_rows_are_padded_as_the_run_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths)
    wide = []

    def noted(model: Any, rows: Any, collate: Any, **settings: Any) -> Any:
        wide.append(collate([rows[0], rows[1]])["input_ids"].shape[1])
        return measure(model, rows, collate, **settings)

    monkeypatch.setattr("lisa_ds.evaluate.loss.measure", noted)
    for more in ([], ["data.pad_to_multiple_of=64"]):
        assert main(["evaluate", "model", "data.eval_path=rows.jsonl", *more]) == 0
    assert wide[0] % 64 != 0
    assert wide[1] == wide[0] + -wide[0] % 64


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_on_a_gpu_it_is_that_of_the_cpu(place: Path, dtype: str, tolerance: float) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths)
    assert main(["evaluate", "model", "data.eval_path=rows.jsonl", "--dtype", dtype, "--out", "found.jsonl"]) == 0
    record = next(records.read("found.jsonl"))
    rows = data.load_held_out(opened(["data.eval_path=rows.jsonl"]).config.data, tiny.tokenizer())
    total, count = by_rows(AutoModelForCausalLM.from_pretrained("model"), rows)
    assert record.value == pytest.approx(total / count, rel=tolerance)
    assert record.device == torch.cuda.get_device_name()


def classifier(place: Path, named: bool) -> None:
    torch.manual_seed(0)
    sizes = tiny.config().to_dict()
    config = LlamaConfig(**{**sizes, "num_labels": 3, "architectures": None})
    if named:  # in another order than that of the alphabet
        config.id2label = {0: "never", 1: "late", 2: "early"}
        config.label2id = {name: i for i, name in config.id2label.items()}
    Classifier(config).save_pretrained(place / "classifier")
    tiny.tokenizer().save_pretrained(place / "classifier")


@pytest.mark.parametrize("named", [True, False])
def test_a_classification_is_the_mean_over_rows_and_has_an_accuracy(place: Path, named: bool) -> None:
    classifier(place, named)
    tiny.write_rows(place / "rows.jsonl", classes)
    words = ["model.task=sequence_classification", "data.eval_path=rows.jsonl", "--out", "found.jsonl"]
    assert main(["evaluate", "classifier", *words]) == 0
    model = AutoModelForSequenceClassification.from_pretrained("classifier")
    tokenizer = AutoTokenizer.from_pretrained("classifier")
    names = ["never", "late", "early"] if named else ["early", "late", "never"]
    losses, right = [], 0
    for row in map(json.loads, (place / "rows.jsonl").read_text().splitlines()):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(F.cross_entropy(logits, torch.tensor([names.index(row["label"])])).item())
        right += names[logits.argmax().item()] == row["label"]
    read = {record.name: record.value for record in records.read("found.jsonl")}
    assert read["held_out_loss_per_row"] == pytest.approx(sum(losses) / len(losses), rel=EXACT)
    assert read["held_out_accuracy"] == right / len(losses)
    assert 0 < right < len(losses)


def write_classifying_adapter(place: Path, count: int) -> Any:
    """An adapter with a head for ``count`` classes, on a language model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained("model", num_labels=count)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    whole = peft.get_peft_model(base, config).eval()
    whole.save_pretrained("adapter")
    return whole


@pytest.mark.parametrize("trained_on", [True, False])
def test_an_adapter_s_classes_are_those_of_its_own_head(
    place: Path, capsys: pytest.CaptureFixture[str], trained_on: bool
) -> None:
    whole = write_classifying_adapter(place, 3)
    tiny.write_rows(place / "rows.jsonl", classes)
    tiny.write_rows(place / "few.jsonl", lambda i: {"text": f"so {i}", "label": ("late", "never")[i % 2]}, count=8)
    words = ["model.task=sequence_classification", "data.eval_path=few.jsonl", "--out", "found.jsonl"]
    if not trained_on:
        assert main(["evaluate", "adapter", *words]) == 2
        assert capsys.readouterr().err.startswith(
            "lisa-ds: error: adapter: tells 3 classes apart, and the rows name 2; an adapter does not hold their names, so that of each "
            "is not known: set data.path to the rows it was trained on\n"
        )
        return
    assert main(["evaluate", "adapter", "data.path=rows.jsonl", *words]) == 0
    tokenizer, names, losses = tiny.tokenizer(), ["early", "late", "never"], []
    for row in map(json.loads, (place / "few.jsonl").read_text().splitlines()):
        with torch.no_grad():
            logits = whole(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(F.cross_entropy(logits, torch.tensor([names.index(row["label"])])).item())
    read = {record.name: record.value for record in records.read("found.jsonl")}
    assert read["held_out_loss_per_row"] == pytest.approx(sum(losses) / len(losses), rel=EXACT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.num_labels=2"], "command line: model.num_labels: the adapter in adapter tells 3 classes apart, got 2; leave it out\n"),
        ([], "adapter: tells 3 classes apart, and the rows have 4\n"),
    ],
)  # fmt: skip
def test_other_classes_than_an_adapter_s_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write_classifying_adapter(place, 3)
    tiny.write_rows(place / "rows.jsonl", lambda i: {"text": str(i), "label": "abcd"[i % 4]})
    assert main(["evaluate", "adapter", "model.task=sequence_classification", "data.eval_path=rows.jsonl", *words]) == 2
    assert capsys.readouterr().err == f"lisa-ds: error: {message}"


def test_an_adapter_without_a_head_is_no_classifier(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained("model")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    tiny.write_rows(place / "rows.jsonl", classes)
    assert main(["evaluate", "adapter", "model.task=sequence_classification", "data.eval_path=rows.jsonl"]) == 2
    assert capsys.readouterr().err == (
        "lisa-ds: error: adapter: adapter_model.safetensors holds no classifier for task 'sequence_classification'\n"
    )


def measured(folder: str) -> list[float]:
    import os

    os.chdir(folder)
    os.environ["LISA_DS_CACHE"] = f"{folder}/cache"
    found = opened(["data.eval_path=rows.jsonl"])
    rows = data.load_held_out(found.config.data, found.tokenizer)
    collate, own = data.collator(found.tokenizer), 0

    def counted(chosen: list[Any]) -> Any:
        nonlocal own
        own += len(chosen)
        return collate(chosen)

    loss = measure(found.load("float32"), rows, counted, task="causal_lm", batch_size=4)
    return [loss.loss, loss.tokens, loss.rows, own]


@pytest.mark.multirank
def test_ranks_share_the_rows_and_find_the_same(place: Path) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths, count=23)
    one = run_ranks(1, measured, place, str(place))[0]
    found = run_ranks(3, measured, place, str(place))
    for each in found:
        assert each[0] == pytest.approx(one[0], rel=EXACT)
        assert each[1:3] == one[1:3]
    assert ([each[3] for each in found], one[3]) == ([8, 8, 7], 23)


@pytest.mark.multirank
def test_the_command_on_two_ranks_records_what_one_finds(place: Path) -> None:
    tiny.write_rows(place / "rows.jsonl", lengths, count=23)
    command = [str(programs.ROOT / "lisa_ds/cli/__main__.py"), "evaluate", "model", "data.eval_path=rows.jsonl"]
    found = {}
    for ranks in (0, 2):
        words = ["--batch-size", "3", "--out", f"{ranks}.jsonl"]
        done = programs.on_ranks(ranks, [*command, *words], place, programs.variables(place))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("held-out loss per token") == 1
        found[ranks] = {record.name: record for record in records.read(f"{ranks}.jsonl")}["held_out_loss_per_token"]
    assert found[2].value == pytest.approx(found[0].value, rel=EXACT)
    assert (found[2].n, found[2].settings["rows"]) == (found[0].n, 23)
    assert [(each.device, each.settings["ranks"]) for each in found.values()] == [("CPU", 1), ("2 x CPU", 2)]


def even(i: int) -> dict[str, str]:
    """As many labelled tokens in every row."""
    return {"instruction": "?" * (1 + i % 9), "input": "", "output": f"It is {i:03}."}


@pytest.mark.multirank
def test_of_a_run_s_model_it_is_the_trainer_s_where_all_batches_have_as_many_labels(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    tiny.write_rows(folder / "rows.jsonl", even)
    words = ["training.bf16=false", "training.per_device_eval_batch_size=2", "data.eval_fraction=0.3"]
    done = launch(folder, *words, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LISA_DS_CACHE", str(folder / "cache"))
        assert main(["evaluate", "out", "--out", "found.jsonl"]) == 0
    (after,) = [
        record.value
        for record in records.read(folder / "out/records.jsonl")
        if record.name == "held_out_loss" and record.x
    ]
    found = {record.name: record for record in records.read(folder / "found.jsonl")}
    assert found["held_out_loss_per_token"].value == pytest.approx(after, rel=1e-5)
    assert found["held_out_loss_per_token"].variant == "out"
    assert found["held_out_loss_per_token"].settings["data"]["eval_fraction"] == 0.3
    assert found["held_out_loss_per_token"].n == 11 * found["held_out_loss_per_token"].settings["rows"] > 11
