"""The recipes for methods, end to end on small models of the same families: from the file in configs to answers of the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from lisa_ds import records, run_log
from lisa_ds.cli import main
from lisa_ds.models import answer
from tests import programs, tiny
from tests.training_runs import launch

pytestmark = pytest.mark.multirank

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "training.max_steps": 6,
    "training.output_dir": "out",
    "training.logging_steps": 1,
    "model.name_or_path": "model",
}
FIRST = {"training.warmup_steps": 1, "training.save_steps": 3}


def words(overrides: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def prepared(folder: Path, recipe: Path, rows: Any, count: int = 40, **model: Any) -> Path:
    """A folder with the recipe as run.yaml, a tiny Llama and rows."""
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(recipe.read_text())
    tiny.write_model(folder / "model", **model)
    tiny.write_rows(folder / "rows.jsonl", rows, count)
    return folder


def instruction(i: int) -> dict[str, str]:
    return {"input": f"What is {i} and {i}?", "target": f"{i + i}"}


@pytest.mark.more
def test_bloom_learns_instructions_by_lora_from_the_stock_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path, CONFIGS / "recipes/bloom-7b1-lora-24gb.yaml", instruction)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "n_layer": 3,
        "n_head": 4,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    BloomForCausalLM(BloomConfig(**sizes, eos_token_id=1, bos_token_id=None)).save_pretrained(folder / "model")
    template = CONFIGS / "templates/prompt-newline-answer.jinja"
    here = {"data.path": "rows.jsonl", "data.chat_template": str(template), "data.eval_fraction": 0.2, **SMALL, **FIRST}
    here |= {"training.learning_rate": 1e-2, "training.gradient_checkpointing": False}
    launcher = programs.deepspeed(2)
    number = launcher.index("--num_gpus")
    launcher[number : number + 2] = ["--include", "localhost:0,1"]
    command = [*launcher, str(programs.ROOT / "launch/train.py"), "--lisa_config", "run.yaml", *words(here)]
    slots = {"LOCAL_SIZE": "2"}  # how many DeepSpeed counts on a CPU
    done = programs.run(command, folder, {**programs.variables(folder), **slots})
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(r.name, r.x): r.value for r in records.read(folder / "out/records.jsonl") if "planned" not in r.variant}
    assert found["held_out_loss", 6] < found["held_out_loss", 0] - 0.05
    assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    saved = json.loads((folder / "out/model/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (8, 32, 0.1)

    # What base and adapter answer: by the command, and by PEFT.
    import os

    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["generate", "out", "--prompt", "What is 3 and 3?", "--max_new_tokens", "8"]) == 0
        tokenizer = AutoTokenizer.from_pretrained("out/model")
        base = AutoModelForCausalLM.from_pretrained("model")
        theirs = answer(PeftModel.from_pretrained(base, "out/model"), tokenizer, "What is 3 and 3?", 8)
        assert (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}], tokenize=False
            )
            == "2?\n4<|end|>"
        )
    finally:
        os.chdir(before)
    assert capsys.readouterr().out.strip() == theirs.strip()


def test_rows_of_the_bloom_recipe_learn_the_target_alone_and_are_padded_to_eight(tmp_path: Path) -> None:
    from lisa_ds import data
    from lisa_ds.config import load_config

    folder = prepared(tmp_path, CONFIGS / "recipes/bloom-7b1-lora-24gb.yaml", instruction)
    template = CONFIGS / "templates/prompt-newline-answer.jinja"
    config = load_config(
        folder / "run.yaml", words({"data.path": str(folder / "rows.jsonl"), "data.chat_template": str(template)})
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows, _ = data.load_dataset(config.data, tokenizer)
    learned = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in rows]
    asked = [tokenizer.decode(row["input_ids"][: -len([t for t in row["labels"] if t != -100])]) for row in rows]
    assert {f"{q}{a}" for q, a in zip(asked, learned, strict=True)} <= {
        f"What is {i} and {i}?\n{i + i}<|end|>" for i in range(40)
    }
    assert all(text.removesuffix("<|end|>").isdigit() for text in learned)
    batch = data.collator(tokenizer, pad_to_multiple_of=config.data.pad_to_multiple_of)([rows[0], rows[1]])
    assert batch["input_ids"].shape[1] % 8 == 0


GALORE = yaml.safe_load((CONFIGS / "arms/galore-five.yaml").read_text())


@pytest.mark.parametrize(
    "name", [next(iter(GALORE)), *(pytest.param(n, marks=pytest.mark.more) for n in list(GALORE)[1:])]
)
def test_galores_five_experiments(tmp_path: Path, name: str) -> None:
    folder = prepared(tmp_path, CONFIGS / "recipes/llama-2-7b-galore-24gb.yaml", tiny.alpaca)
    arm = {key: value for key, value in GALORE[name].items() if key != "rates"}
    here = {
        "data.path": "rows.jsonl",
        "data.eval_fraction": 0.25,
        "training.eval_steps": 2,
        "training.bf16": False,
        **SMALL,
        **arm,
    }
    here |= {
        "galore.rank": 8,
        "training.learning_rate": 5e-3,
        "training.save_steps": 2,
        "training.early_stopping_patience": 2,
    }
    done = launch(folder, *words(here), ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = run_log.read(folder / "out/log.jsonl").entries
    losses = {
        "train": [e["loss"] for e in entries if "loss" in e],
        "held out": [e["eval_loss"] for e in entries if "eval_loss" in e],
    }
    assert len(losses["train"]) == 6  # the gap between the two is what the report draws
    assert len(losses["held out"]) >= 4
    assert losses["held out"][-1] < losses["held out"][0]


PAPER = yaml.safe_load((CONFIGS / "arms/lisa-paper.yaml").read_text())


@pytest.mark.more
@pytest.mark.parametrize("name", list(PAPER))
def test_the_columns_of_lisas_tables(tmp_path: Path, name: str) -> None:
    folder = prepared(tmp_path, CONFIGS / "recipes/paper-llama-2-7b-2l.yaml", tiny.alpaca, num_hidden_layers=6)
    here = {"data.path": "rows.jsonl", "data.eval_fraction": 0.25, "lisa.interval_steps": 2, **SMALL, **PAPER[name]}
    here |= {"training.learning_rate": 5e-3, "training.save_strategy": "no", "training.gradient_accumulation_steps": 1}
    done = launch(folder, *words(here), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(r.name, r.x): r.value for r in records.read(folder / "out/records.jsonl") if "planned" not in r.variant}
    assert found["held_out_loss", 6] < found["held_out_loss", 0]
    visited = {"full": 6, "LoRA r128": 6, "LoRA r256": 6, "E+H+2L, fixed layers": 2}
    if name in visited:
        assert found["layers_visited", None] == visited[name]
    else:
        assert found["layers_visited", None] >= PAPER[name]["lisa.num_sampled_layers"]


@pytest.mark.more
def test_continual_pre_training_and_then_half_the_layers(tmp_path: Path) -> None:
    recipe = CONFIGS / "recipes/llama-3.1-8b-continual-8x80gb.yaml"
    folder = prepared(tmp_path, recipe, tiny.text, 200)
    here = {
        "data.path": "rows.jsonl",
        "data.eval_fraction": 0.1,
        "data.max_length": 48,
        **SMALL,
        "training.learning_rate": 5e-3,
    }
    here |= {
        "training.output_dir": "first",
        "training.save_strategy": "no",
        "training.gradient_accumulation_steps": 1,
        "lisa.interval_steps": 2,
    }
    here |= {"lisa.num_sampled_layers": 4}
    done = launch(folder, *words(here), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    tiny.write_rows(folder / "pairs.jsonl", tiny.alpaca, 40)
    then = {
        **here,
        "model.name_or_path": "first/model",
        "data.path": "pairs.jsonl",
        "data.packing": False,
        "data.format": "alpaca",
    }
    then |= {"training.output_dir": "second", "lisa.num_sampled_layers": 2, "data.eval_fraction": 0.25}
    done = launch(folder, *words(then), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("first", "second"):
        found = {
            (r.name, r.x): r.value for r in records.read(folder / name / "records.jsonl") if "planned" not in r.variant
        }
        assert found["held_out_loss", 6] < found["held_out_loss", 0]


def medical(i: int) -> dict[str, Any]:
    """As PubMedQA is told to a model: a context, a question, and an answer of one word behind its reason."""
    return {
        "question": f"Context: {i} of {i + 3} patients were better.\nQuestion: were all of them?",
        "long_answer": f"{i} is less than {i + 3}. Answer: no",
    }


@pytest.mark.more
@pytest.mark.parametrize("method", ["lisa", "lora"])
def test_rows_like_pubmedqa(tmp_path: Path, method: str) -> None:
    folder = prepared(tmp_path, CONFIGS / "recipes/tinyllama-24gb.yaml", medical)
    here = {
        "data.path": "rows.jsonl",
        "data.columns": {"question": "prompt", "long_answer": "completion"},
        "data.eval_fraction": 0.2,
    }
    here |= {
        **SMALL,
        "method": method,
        "training.learning_rate": 1e-2,
        "lisa.interval_steps": 2,
        "training.save_strategy": "no",
    }
    here |= {"training.gradient_accumulation_steps": 1}
    done = launch(folder, *words(here), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(r.name, r.x): r.value for r in records.read(folder / "out/records.jsonl") if "planned" not in r.variant}
    assert found["held_out_loss", 6] < found["held_out_loss", 0]
