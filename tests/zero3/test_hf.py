"""LISA in trainers of transformers and TRL: the scripts of docs/huggingface.md, run as they stand, and what attach promises."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 6, 3  # with intervals of two steps: saved in the middle of one


def script(title: str) -> str:
    """The first code block below a heading, with a shorter run and shorter intervals."""
    section = (ROOT / "docs/huggingface.md").read_text().split(f"## {title}\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    return (
        code[1]
        .replace(
            "max_steps=200, save_steps=100", f"max_steps={STEPS}, save_steps={SAVED}, logging_steps=1, report_to=[]"
        )
        .replace('"interval_steps": 20', '"interval_steps": 2')
    )


@pytest.mark.parametrize("title", ["Trainer", "TRL"])
def test_a_script_takes_at_most_twenty_lines(title: str) -> None:
    assert len([line for line in script(title).splitlines() if line.strip()]) <= 20


@pytest.mark.multirank
def test_trainers(tmp_path: Path) -> None:
    """One spawn for all that two ranks have to show: starting them is most of the time."""
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "text.jsonl", tiny.text)
    tiny.write_rows(tmp_path / "pairs.jsonl", tiny.pair)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    scripts = {"Trainer": (script("Trainer"), "text.jsonl"), "TRL": (script("TRL"), "pairs.jsonl")}
    ranks = run_ranks(2, on_ranks, tmp_path, str(tmp_path), scripts, timeout_s=300)
    for rank in ranks:
        for title, seen in rank["scripts"].items():
            assert seen["engine"] == "LisaEngine", title
            assert seen["history"] == seen["resumed_history"], title
            assert len(seen["history"]) == STEPS // 2 + 1
            assert seen["differing"] == [], title
            assert seen["logs"] == seen["resumed_logs"], title
            assert [entry["lisa/interval"] for entry in seen["logs"]] == [0, 0, 1, 1, 2, 2], title
            assert all(entry["lisa/state_mb"] > 0 for entry in seen["logs"]), title
        assert rank["refused"] == {
            "without DeepSpeed": "attach: the trainer does not run under DeepSpeed",
            "stage 2": "attach: LISA shards its state under ZeRO-3, but the trainer's DeepSpeed config has",
            "twice": "attach: this trainer is attached already",
            "after evaluate": "attach: the trainer has built its engine already",
            "misspelt": "deepspeed config: gradient_clippping: DeepSpeed",
            "optimizer on disk": "deepspeed config: zero_optimization.offload_optimizer.device: 'nvme' is not supported",
            "wrong key": "lisa_config: interval_step: unknown key, got 2; did you mean 'interval_steps'?",
        }
        assert rank["reference"] == ("LisaEngine", "DeepSpeedEngine", True)
        assert rank["failed"] == ("stop here", True)
        assert rank["epoch"] == [0, 0, 1, 1]


def on_ranks(directory: str, scripts: dict[str, tuple[str, str]]) -> dict[str, Any]:
    # Threads of pyarrow and gloo now and then abort a process that has done all its work and takes Python apart.
    atexit.register(os._exit, 0)
    os.chdir(directory)
    return {
        "refused": refused(),  # first: accelerate keeps what the trainers of a process have asked for
        "scripts": {title: stopped_and_resumed(*given) for title, given in scripts.items()},
        "reference": with_a_reference_model(),
        "failed": with_an_error(),
        "epoch": by_epochs(),
    }


def stopped_and_resumed(code: str, rows: str) -> dict[str, Any]:
    """Run a script, then again from the checkpoint in its middle."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    first = execute(code, rows)
    logs, history, engine = training_logs(first), first.deepspeed.layer_history, type(first.deepspeed).__name__
    weights = load_file(f"out/checkpoint-{STEPS}/model.safetensors")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(f"out/checkpoint-{STEPS}")
    dist.barrier()
    second = execute(code, "--resume", rows)
    again = load_file(f"out/checkpoint-{STEPS}/model.safetensors")
    state = json.loads(Path(f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree("out")
    dist.barrier()
    return {
        "engine": engine,
        "logs": logs,
        "resumed_logs": training_logs(second),
        "history": history,
        "resumed_history": second.deepspeed.layer_history,
        "differing": [name for name, weight in weights.items() if not weight.equal(again[name])],
    }


def execute(code: str, *arguments: str) -> Any:
    import sys

    *flags, rows = arguments
    sys.argv = ["train.py", "--local_rank=0", *flags, "model", rows]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "docs/huggingface.md", "exec"), names)
    return names["trainer"]


def training_logs(trainer: Any) -> list[dict[str, float]]:
    # Not all entries: TRL's count of tokens starts anew after a resume, whatever the engine.
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "lisa/interval", "lisa/state_mb")
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]


def make_trainer(deepspeed: Any, **changes: Any) -> Any:
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    kept = {key: changes.pop(key) for key in ("callbacks",) if key in changes}
    args = TrainingArguments(
        **{"output_dir": "made", "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 2, "report_to": []},
        **{"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "deepspeed": deepspeed, **changes},
    )
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    return Trainer(LlamaForCausalLM(tiny.config()), args, train_dataset=rows, eval_dataset=rows, **kept)


def zero(stage: int) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": stage}}


def refused() -> dict[str, str]:
    import lisa_ds

    plain, stage_2, twice, late = (
        make_trainer(None),
        make_trainer(zero(2)),
        make_trainer(zero(3)),
        make_trainer(zero(3)),
    )
    misspelt = make_trainer({**zero(3), "gradient_clippping": "1.0"})
    on_disk = make_trainer({**zero(3), "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}})
    lisa_ds.attach(twice)
    late.evaluate()
    messages = {}
    for case, trainer, config in (
        ("without DeepSpeed", plain, {}),
        ("stage 2", stage_2, {}),
        ("twice", twice, {}),
        ("after evaluate", late, {}),
        ("misspelt", misspelt, {}),
        ("optimizer on disk", on_disk, {}),
        ("wrong key", plain, {"interval_step": 2}),
    ):
        with pytest.raises(lisa_ds.LisaError) as caught:
            lisa_ds.attach(trainer, config)
        messages[case] = re.split(
            r"[;,] (?:give|build|attach before|use)|(?<!:) zero_opt| [0-9.]+ does", str(caught.value)
        )[0]
    return messages


def with_a_reference_model() -> tuple[str, str, bool]:
    """TRL's DPO keeps a second model under DeepSpeed."""
    import deepspeed
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    import lisa_ds

    rows = [{**tiny.pair(i), "chosen": tiny.pair(i)["completion"]} for i in range(8)]
    rows = [{"prompt": r["prompt"], "chosen": r["chosen"], "rejected": tiny.pair(99)["completion"]} for r in rows]
    args = DPOConfig("dpo", deepspeed=zero(3), use_cpu=True, bf16=False, max_steps=3, save_strategy="no", report_to=[])
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained("model"),
        AutoModelForCausalLM.from_pretrained("model"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    stock = deepspeed.DeepSpeedEngine
    lisa_ds.attach(trainer, {"num_sampled_layers": 1, "interval_steps": 2})
    trainer.train()
    return type(trainer.deepspeed).__name__, type(trainer.ref_model).__name__, deepspeed.DeepSpeedEngine is stock


def with_an_error() -> tuple[str, bool]:
    import deepspeed
    from transformers import TrainerCallback

    import lisa_ds

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop here")

    stock = deepspeed.DeepSpeedEngine
    trainer = make_trainer(zero(3), callbacks=[Stop()])
    lisa_ds.attach(trainer)
    with pytest.raises(RuntimeError) as caught:
        trainer.train()
    return str(caught.value), deepspeed.DeepSpeedEngine is stock


def by_epochs() -> list[int]:
    """Intervals of an epoch: 8 rows, 2 ranks of 2 rows at a time, so 2 steps."""
    import lisa_ds

    trainer = make_trainer(zero(3))
    lisa_ds.attach(trainer, {"interval_steps": "1epoch", "num_sampled_layers": 1})
    trainer.train()
    return [entry["lisa/interval"] for entry in training_logs(trainer)]
