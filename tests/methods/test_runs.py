"""Runs by each method through launch/train.py on two CPU ranks: bytes, adapters, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from lisa_ds import data, records
from lisa_ds.cli import main
from lisa_ds.config import load_config
from lisa_ds.memory import forecast, settings
from tests import programs, tiny
from tests.training_runs import launch, write_run

pytestmark = pytest.mark.multirank

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ADAPTERS = {"rank": 3, "alpha": 6}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": ADAPTERS},
    "lora, ZeRO-2": {"method": "lora", "lora": ADAPTERS, "deepspeed": {"zero_optimization": {"stage": 2}}},
    "dora, some linears": {
        "method": "lora",
        "lora": {**ADAPTERS, "dora": True, "rslora": True, "targets": ["q_proj", "up_proj"]},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    "galore": {"method": "galore", "galore": {"rank": 5, "update_proj_gap": 2}},
    "galore, 8 bits, regex": {
        "method": "galore",
        "galore": {"rank": 5, "moments": "int8", "targets": r"model\.layers\.[12]\.mlp\..*", "proj_type": "full"},
    },
    "galore, fp32 masters": {"method": "galore", "galore": {"rank": 5, "master_weights": True}},
    "full": {"method": "full"},
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "lora, offload": {"method": "lora", "lora": ADAPTERS, "deepspeed": {"zero_optimization": {"stage": 3, **OFFLOAD}}},
    "lora, ZeRO-2, offload": {"method": "lora", "lora": ADAPTERS, "deepspeed": {"zero_optimization": {"stage": 2, **OFFLOAD}}},
    "galore, left": {"method": "galore", "galore": {"rank": 5, "proj_type": "left", "targets": ["attn"]}},
    "galore, reverse": {"method": "galore", "galore": {"rank": 5, "proj_type": "reverse_std"}},
    "galore, right, 8 bits": {"method": "galore", "galore": {"rank": 5, "proj_type": "right", "moments": "int8"}},
}  # fmt: skip
LAYERWISE = {"method": "galore", "galore": {"rank": 5, "layerwise": True}}


def written(folder: Path, case: dict[str, Any], **training: Any) -> Path:
    """A run file for a case; its model is written with large enough matrices for 8-bit moments."""
    write_run(folder, **case)
    import yaml

    file = folder / "run.yaml"
    run = yaml.safe_load(file.read_text())
    run["training"] |= training
    file.write_text(yaml.safe_dump(run))
    return folder


def done(folder: Path, *more: str, ranks: int = 2) -> str:
    finished = launch(folder, *more, ranks=ranks)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def told(folder: Path, out: str = "out") -> dict[str, float]:
    return {
        record.name + (f"@{record.x:g}" if record.x is not None else ""): record.value
        for record in records.read(folder / out / "records.jsonl")
        if "planned" not in record.variant
    }


def planned_state(folder: Path, ranks: int) -> dict[str, int]:
    config = load_config(folder / "run.yaml")
    architecture = settings.architecture_of(config.model.model_copy(update={"name_or_path": str(folder / "model")}))
    run = settings.from_run(config, architecture, num_ranks=ranks)
    forecasted = forecast(architecture, run)
    return {part: forecasted.phases["step"].get(part, 0) + forecasted.host.get(part, 0) for part in
            ("weights", "gradients", "master", "moments", *(("buckets",) if config.method == "galore" else ()))}  # fmt: skip


def live_state(found: dict[str, float], *, ddp: bool) -> dict[str, float]:
    live = {key.removeprefix("live_bytes/"): value for key, value in found.items() if key.startswith("live_bytes/")}
    return {
        **{part: live[part] for part in ("weights", "gradients", "master")},
        "moments": live["exp_avg"] + live["exp_avg_sq"],
        **({"buckets": live["buckets"]} if ddp else {}),
    }


SHORT = ("lora", "lora, ZeRO-2", "galore, 8 bits, regex")


@pytest.mark.parametrize(
    "name", [*SHORT, *(pytest.param(name, marks=pytest.mark.more) for name in {**CASES, **MORE} if name not in SHORT)]
)
def test_a_run_trains_and_its_bytes_are_those_planned(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "run", {**CASES, **MORE}[name], gradient_accumulation_steps=1)
    done(folder)
    found = told(folder)
    assert found["held_out_loss@6"] < found["held_out_loss@0"] - 0.02
    assert live_state(found, ddp="galore" in name) == planned_state(folder, 2)


def test_layerwise_galore_holds_one_gradient(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", LAYERWISE, gradient_accumulation_steps=1)
    output = done(folder, ranks=1)
    assert "layer statistics are not recorded: with galore.layerwise gradients are gone" in output
    assert live_state(told(folder), ddp=True) == planned_state(folder, 1)


def reference_adapters(folder: Path, steps: int) -> dict[str, Tensor]:
    """The same run by PEFT and torch's AdamW in one process, in fp32; two micro-batches stand for two ranks."""
    config = load_config(folder / "run.yaml")
    here = {"path": str(folder / "rows.jsonl")}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows, _ = data.load_dataset(config.data.model_copy(update=here), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    set_seed(42)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=r".*layers.*_proj"))
    args = TrainingArguments(
        str(folder / "reference"),
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        adam_epsilon=1e-4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    Trainer(wrapped, args, train_dataset=rows, data_collator=data.collator(tokenizer)).train()
    return {name.replace(".default", ""): p.detach() for name, p in wrapped.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["lora", "lora, ZeRO-2"])
def test_adapters_are_those_of_peft_in_one_process_and_can_be_gone_on_with(tmp_path: Path, name: str) -> None:
    # Four steps: in a fifth the rows are used up, and two ranks fill the batch up as one does not.
    exact = {"bf16": False, "adam_epsilon": 1e-4, "gradient_accumulation_steps": 1, "max_steps": 4}
    folder = written(tmp_path / "run", CASES[name], **exact)
    done(folder)
    ours = load_file(folder / "out/model/adapter_model.safetensors")
    theirs = reference_adapters(folder, 4)
    assert set(ours) == set(theirs)
    apart = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
    moved = max(theirs[key].abs().max().item() for key in ours if "lora_B" in key)
    assert apart < 1e-5 < 1e-2 < moved

    # The weights beside them are those of the base, to the bit: what is reloaded has the loss that the run has told.
    settings_of = json.loads((folder / "out/model/adapter_config.json").read_text())
    assert settings_of["base_model_name_or_path"] == "model"
    found = told(folder)
    again = done(folder, "training.output_dir=again", "lora={adapter: out/model}", "training.learning_rate=0")
    assert "held-out loss" in again
    after = told(folder, "again")
    assert after["held_out_loss@0"] == after["held_out_loss@4"] == found["held_out_loss@4"] != found["held_out_loss@0"]
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    PeftModel.from_pretrained(base, str(folder / "out/model"))  # as any user of PEFT reads it


@pytest.mark.parametrize(
    "name", ["lora", "galore", "lora, ZeRO-2", pytest.param("dora, some linears", marks=pytest.mark.more)]
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "run", CASES[name], lr_scheduler_type="linear", warmup_steps=2)
    done(folder)
    done(folder, "training.output_dir=cut", "training.max_steps=3", "training.lr_scheduler_kwargs={}")
    whole = [path for path in (folder / "out/model").glob("*.safetensors")]
    # A run that is cut at its third step: its checkpoint of the whole run, alone in a directory.
    (folder / "part").mkdir()
    (folder / "out/checkpoint-3").rename(folder / "part/checkpoint-3")
    output = done(folder, "--resume", "auto", "training.output_dir=part")
    assert "going on from part/checkpoint-3, after step 3" in output
    for path in whole:
        one, other = load_file(path), load_file(folder / "part/model" / path.name)
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one)
    short = load_file(folder / "cut/model" / whole[0].name)
    assert any(not torch.equal(one[key], short[key]) for key in one)  # control: the last steps did something


def labelled(i: int) -> dict[str, Any]:
    return {"text": f"{i} is {'even' if i % 2 == 0 else 'odd'}", "label": i % 2}


@pytest.mark.more
@pytest.mark.parametrize("stage", [3, 2])
def test_a_classifier_trains_its_head_beside_the_adapters(tmp_path: Path, stage: int) -> None:
    case = {"method": "lora", "lora": ADAPTERS, "deepspeed": {"zero_optimization": {"stage": stage}}}
    folder = written(tmp_path / "run", case, bf16=False)
    tiny.write_rows(folder / "rows.jsonl", labelled, 40)
    task = ("model.task=sequence_classification", "data.format=classification")
    done(folder, *task)
    found = told(folder)
    assert found["held_out_loss@6"] < found["held_out_loss@0"]
    saved = load_file(folder / "out/model/adapter_model.safetensors")
    assert any("score" in name for name in saved)
    done(folder, *task, "training.output_dir=again", "lora={adapter: out/model}", "training.learning_rate=0")
    assert told(folder, "again")["held_out_loss@0"] == pytest.approx(found["held_out_loss@6"], rel=1e-6)


def even(i: int) -> dict[str, str]:
    """As many labelled tokens in every row: then a mean over batches is one over tokens."""
    return {"instruction": "?" * (1 + i % 9), "input": "", "output": f"It is {i:03}."}


def test_what_a_run_has_made_is_measured_merged_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "run", CASES["lora"], bf16=False, per_device_eval_batch_size=1)
    tiny.write_rows(folder / "rows.jsonl", even)
    (folder / "prompts.txt").write_text("??\n")
    done(folder, "data.eval_fraction=0.3")
    for name, value in programs.variables(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    assert main(["evaluate", "out", "--out", "found.jsonl"]) == 0
    assert main(["merge", "out/model", "--out", "merged"]) == 0
    assert (
        main(["evaluate", "merged", "--lisa_config", "run.yaml", "data.eval_fraction=0.3", "--out", "merged.jsonl"])
        == 0
    )
    recorded = told(folder)
    adapter, merged = (next(records.read(name)) for name in ("found.jsonl", "merged.jsonl"))
    assert adapter.name == "held_out_loss_per_token"
    assert adapter.value == pytest.approx(recorded["held_out_loss@6"], rel=1e-5)
    assert merged.value == pytest.approx(adapter.value, rel=1e-5)
    assert adapter.value != pytest.approx(recorded["held_out_loss@0"], rel=1e-3)  # the control
    assert (adapter.variant, adapter.settings["base"]) == ("out", "model")
    assert main(["evaluate", "out", "--samples", "prompts.txt", "--max-new-tokens", "12"]) == 0
    (line,) = (json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines())
    capsys.readouterr()
    for when, model in (("before", "model"), ("after", "merged")):
        assert main(["generate", model, "--prompt", "??", "--max_new_tokens", "12"]) == 0
        assert capsys.readouterr().out == f"{line[when]}\n"
    assert line["before"] != line["after"]
