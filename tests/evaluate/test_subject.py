"""Which model a word means, whose data it is measured on, and what is refused before any work."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lisa_ds import records
from lisa_ds.cli import main
from lisa_ds.evaluate.opened import open_subject
from lisa_ds.evaluate.subject import find, settings
from lisa_ds.models import load_model
from tests import tiny

RUN = {"model": {"name_or_path": "base"}, "data": {"path": "rows.jsonl", "eval_fraction": 0.25, "max_length": 64}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny.write_model(tmp_path / "base")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.alpaca)
    return tmp_path


def write_run(place: Path, fields: Any = RUN) -> Path:
    tiny.write_model(place / "runs/one/model")
    summary = records.Record(
        **{"name": "steps", "variant": "lisa", "value": 1, "unit": "", "device": "CPU", "commit": "", "versions": {}},
        settings={"config": fields},
    )
    records.append(place / "runs/one/records.jsonl", summary)
    return place / "runs/one"


def write_adapter(place: Path, base: str | None = "base") -> Path:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(place / "adapter")
    saved = json.loads((place / "adapter/adapter_config.json").read_text())
    (place / "adapter/adapter_config.json").write_text(json.dumps({**saved, "base_model_name_or_path": base}))
    return place / "adapter"


def test_a_run_s_directory_is_its_model_and_its_data(place: Path) -> None:
    run = write_run(place)
    for name in ("runs/one", "runs/one/model"):
        subject = find(name)
        assert (subject.model, subject.run, subject.title) == ("runs/one/model", Path("runs/one"), "one")
        config = settings(subject, None, ["data.eval_max_rows=3"])
        assert (config.data.eval_fraction, config.data.eval_max_rows) == (0.25, 3)
        assert config.model.name_or_path == "runs/one/model"
    assert config.where("data.eval_fraction") == "runs/one/records.jsonl: data.eval_fraction"
    assert run.is_dir()


def test_a_run_file_takes_the_place_of_what_the_run_recorded(place: Path) -> None:
    write_run(place)
    (place / "run.yaml").write_text(json.dumps({**RUN, "data": {"path": "rows.jsonl", "eval_fraction": 0.5}}))
    assert settings(find("runs/one"), "run.yaml", []).data.eval_fraction == 0.5


def test_what_is_of_the_run_s_own_model_does_not_go_to_another(place: Path) -> None:
    (place / "run.yaml").write_text(json.dumps({**RUN, "model": {"name_or_path": "base", "revision": "v2"}}))
    write_run(place)
    assert settings(find("base"), "run.yaml", []).model.revision == "v2"
    assert settings(find("runs/one"), "run.yaml", []).model.revision is None
    assert settings(find("runs/one"), "run.yaml", ["model.revision=v3"]).model.revision == "v3"


def test_an_adapter_is_measured_on_its_base(place: Path) -> None:
    write_adapter(place)
    assert (find("adapter").model, find("adapter").adapter) == ("base", Path("adapter"))
    losses = {}
    for name in ("adapter", "base"):
        words = ["data.eval_path=rows.jsonl", "--dtype", "float32", "--out", f"{name}.jsonl"]
        assert main(["evaluate", name, *words]) == 0
        losses[name] = next(records.read(f"{name}.jsonl"))
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, "adapter").merge_and_unload()
    merged.save_pretrained("merged")
    tiny.tokenizer().save_pretrained("merged")
    assert main(["evaluate", "merged", "data.eval_path=rows.jsonl", "--out", "merged.jsonl"]) == 0
    assert losses["adapter"].value == pytest.approx(next(records.read("merged.jsonl")).value, rel=1e-5)
    assert losses["adapter"].value != pytest.approx(losses["base"].value, rel=1e-3)
    assert losses["adapter"].settings["base"] == "base"


EVAL = "data.eval_path=rows.jsonl"
OWN_DATA = [EVAL]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all: no such directory (looked from "),
        (["builtin:smollm"], "builtin:smollm: no such built-in model; did you mean 'builtin:smollm2-135m'?"),
        (["empty"], "empty: holds neither config.json nor adapter_config.json, nor a run's model/\n"),
        (
            ["stopped"],
            "stopped: holds neither config.json nor adapter_config.json, nor a run's model/; make a model of a checkpoint with `lisa-ds "
            "export stopped/checkpoint-2 stopped/model`\n",
        ),
        (
            ["base"],
            "data: holds out no rows, so there is nothing to measure base on; set data.eval_path, data.eval_split or data.eval_fraction, "
            "or name the file of its run, --lisa_config FILE\n",
        ),
        (["base", "data.eval_path=none.jsonl"], "command line: data.eval_path: no such file"),
        (
            ["base", EVAL, "training.bf16=true"],
            "command line: training.bf16: an evaluation reads model and data alone; leave it out\n",
        ),
        (
            ["base", EVAL, "model.name_or_path=x"],
            "command line: model.name_or_path: the model is the first word after evaluate, got 'model.name_or_path=x'\n",
        ),
        (["base", EVAL, "data.pathh=x"], "command line: data.pathh: unknown key, got 'x'; did you mean 'data.path'?"),
        (
            ["base", EVAL, "--answers", "q.jsonl", "--out", "a"],
            "command line: data.eval_path: no rows of the run are read here; leave it out\n",
        ),
        (["base", EVAL, "--limit", "3"], "--limit: goes with --tasks\n"),
        (["base", "--tasks", "a", "--samples", "b"], "argument --samples: not allowed with argument --tasks"),
        (["base", "--tasks", "a", "--max-new-tokens", "9"], "--max-new-tokens: goes with --answers and --samples\n"),
        (["base", "--answers", "q.jsonl"], "--answers: say where the answers go, --out FILE.jsonl\n"),
        (
            ["base", "--samples", "p.txt", "--out", "x"],
            "--samples: writes samples.jsonl into the run's directory; leave",
        ),
        (
            ["small", EVAL],
            "command line: model.name_or_path: the embedding of 'small' has 100 rows, but its tokenizer ",
        ),
        (
            ["small", "--answers", "q.jsonl", "--out", "a"],
            "small: its tokenizer knows 260 tokens, and its embedding has 100 rows; use",
        ),
    ],
)
def test_mistakes_are_found_before_any_weight_is_read(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    (place / "empty").mkdir()
    (place / "stopped/checkpoint-2").mkdir(parents=True)
    (place / "q.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["1?"]}\n')
    tiny.write_model(place / "small", vocab_size=100)
    monkeypatch.setattr("lisa_ds.evaluate.opened.load_model", lambda *args: pytest.fail("weights were read"))
    before = sorted(place.glob("*"))
    assert main(["evaluate", *words]) == 2
    assert capsys.readouterr().err.startswith(f"lisa-ds: error: {message}")
    assert {path.name for path in set(place.glob("*")) - set(before)} <= {"cache"}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            None,
            "adapter/adapter_config.json: base_model_name_or_path: should name the model that the adapter was trained on, got None",
        ),
        ("gone/base", "adapter/adapter_config.json: base_model_name_or_path: gone/base: no such directory"),
    ],
)
def test_an_adapter_without_its_base_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], base: str | None, message: str
) -> None:
    write_adapter(place, base)
    if base:
        (place / "gone").mkdir()
        (place / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"./{base}"}))
        message = message.replace(": gone", ": ./gone")
    assert main(["evaluate", "adapter", EVAL]) == 2
    assert capsys.readouterr().err.startswith(f"lisa-ds: error: {message}")


def test_an_adapter_of_another_model_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(place)
    tiny.write_model(place / "base", hidden_size=64)
    assert main(["evaluate", "adapter", EVAL]) == 2
    assert "adapter: the adapter cannot be read, or does not fit its base model: " in capsys.readouterr().err


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def without_a_tensor(weights: Path) -> None:
    found = load_file(weights)
    del found[next(name for name in found if "layers.2" in name and "lora_B" in name)]
    save_file(found, weights, {"format": "pt"})


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "adapter: the adapter cannot be read, or does not fit its base model: "),
        (
            without_a_tensor,
            "adapter: lacks base_model.model.model.layers.2.self_attn.q_proj.lora_B.default.weight, which adapter_config.json asks for\n",
        ),
    ],
)
def test_a_damaged_or_incomplete_adapter_is_refused_before_weights_are_read(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Any,
    message: str,
    pickled: bool,
) -> None:
    weights = write_adapter(place) / "adapter_model.safetensors"
    if spoil is not cut:
        spoil(weights)
    if pickled:
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    if spoil is cut:
        cut(weights.with_suffix(".bin") if pickled else weights)
    monkeypatch.setattr("lisa_ds.evaluate.opened.load_model", lambda *args: pytest.fail("weights were read"))
    assert main(["evaluate", "adapter", EVAL]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lisa-ds: error: {message}")
    assert said.count("\n") == 1


def test_an_adapter_is_computed_in_the_type_of_the_weights_beside_it(place: Path) -> None:
    write_adapter(place)
    subject = find("adapter")
    model = open_subject(subject, settings(subject, None, []), any_text=True).load("bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_revision_that_an_adapter_names_is_that_of_its_base(place: Path) -> None:
    adapter = write_adapter(place)
    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**saved, "revision": "v2"}))
    assert settings(find("adapter"), None, []).model.revision == "v2"
    assert settings(find("adapter"), None, ["model.revision=v3"]).model.revision == "v3"
    (place / "run.yaml").write_text(json.dumps({**RUN, "model": {"name_or_path": "other", "revision": "v1"}}))
    assert settings(find("adapter"), "run.yaml", []).model.revision == "v2"


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["data.eval_path=other.jsonl"], {"eval_path": "other.jsonl"}),
        (["data.eval_fraction=0.5"], {"eval_fraction": 0.5}),
        (["data.eval_path=other.jsonl", "data.eval_max_rows=2"], {"eval_path": "other.jsonl", "eval_max_rows": 2}),
        (["data.eval_part=verdict"], {"eval_fraction": 0.25, "eval_part": "verdict", "eval_max_rows": 7}),
        ([], {"eval_fraction": 0.25, "eval_part": "select", "eval_max_rows": 7}),
    ],
)
def test_other_held_out_rows_are_not_cut_as_the_run_s(
    place: Path, words: list[str], left: dict[str, Any], from_file: bool
) -> None:
    run = {**RUN, "data": {**RUN["data"], "eval_part": "select", "eval_max_rows": 7}}
    write_run(place, run)
    (place / "run.yaml").write_text(json.dumps(run))
    config = settings(find("runs/one"), "run.yaml" if from_file else None, words).data
    nothing = {"eval_path": None, "eval_split": None, "eval_fraction": 0.0, "eval_part": "all", "eval_max_rows": None}
    assert config.model_dump(include=set(nothing)) == {**nothing, **left}
    assert (config.path, config.max_length) == ("rows.jsonl", 64)


def test_another_split_is_of_the_same_held_out_data(place: Path) -> None:
    data = {"path": "rows.jsonl", "eval_path": "others", "eval_split": "validation", "eval_max_rows": 7}
    write_run(place, {**RUN, "data": data})
    config = settings(find("runs/one"), None, ["data.eval_split=test"]).data
    assert (config.eval_path, config.eval_split, config.eval_max_rows) == ("others", "test", None)


def test_generate_reads_what_the_run_recorded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(place, {**RUN, "model": {**RUN["model"], "trust_remote_code": True}})
    read = []
    monkeypatch.setattr("lisa_ds.evaluate.opened.load_model", lambda config, dtype: read.append(config) or load_model(config, dtype))  # fmt: skip
    assert main(["generate", "runs/one", "--prompt", "1 + 1?", "--max_new_tokens", "3"]) == 0
    assert read[0].trust_remote_code
    classes = {**RUN, "model": {**RUN["model"], "task": "sequence_classification"}}
    write_run(place, classes)
    capsys.readouterr()
    assert main(["generate", "runs/one", "--prompt", "1 + 1?"]) == 2
    assert capsys.readouterr().err == (
        "lisa-ds: error: runs/one/records.jsonl: model.task: a classifier answers no prompts, got 'sequence_classification'\n"
    )


def test_peft_is_named_where_it_is_missing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(place)
    there = importlib.util.find_spec
    monkeypatch.setattr("lisa_ds.evaluate.subject.find_spec", lambda name: None if name == "peft" else there(name))
    assert main(["evaluate", "adapter", EVAL]) == 2
    assert capsys.readouterr().err == (
        "lisa-ds: error: adapter: holds an adapter, for which peft is not installed; pip install 'lisa-ds[peft]'\n"
    )


def test_the_help_loads_no_torch() -> None:
    code = "import sys; from lisa_ds.cli import main; main(['evaluate', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stdout
    assert "--apply-chat-template" in done.stdout
