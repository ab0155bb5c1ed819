"""Bodies in processes of their own: trainers that record their layers, and what plain torch makes of the same models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisa_ds.sampling import statistics
from tests import tiny


def make_trainer(model: Any, output_dir: str, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        **{"output_dir": output_dir, "use_cpu": True, "per_device_train_batch_size": 2, "report_to": [], "seed": 1},
        **{"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2, **changes},
    )
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]
    return Trainer(model, args, train_dataset=rows)


def base_model(**changes: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.config(**changes))


def lora_model(**changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    fields = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(base_model(), LoraConfig(r=4, **fields, **changes))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # B begins at zero, which would hide it
                parameter.normal_(std=0.1)
    return model


def unit_of(name: str) -> str:
    if ".layers." in name:
        return name.split(".layers.")[1].split(".")[0]
    return "embeddings" if "embed" in name else "lm_head" if "lm_head" in name else "rest"


def norms(values: dict[str, Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, value in values.items():
        squares[unit_of(name)] = squares.get(unit_of(name), 0.0) + float(value.double().square().sum())
    return {unit: square**0.5 for unit, square in squares.items()}


def without_deepspeed(folder: str) -> dict[str, Any]:
    """Full and LoRA runs of a plain trainer, each step recorded."""
    from transformers import TrainerCallback

    from lisa_ds.errors import EngineError
    from lisa_ds.integrations.statistics import LayerStatistics

    os.chdir(folder)

    class Moved(TrainerCallback):
        """What each step has added to the weights."""

        def __init__(self) -> None:
            self.norms: list[dict[str, float]] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            after = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            self.norms.append(norms({n: after[n] - self.before[n] for n in after}))

    results: dict[str, Any] = {}
    for name, model, options in (
        ("full", base_model(), {"max_grad_norm": 0.1, "weight_decay": 0.1}),
        ("lora", lora_model(), {"max_grad_norm": 0.1}),
        ("dora", lora_model(use_dora=True), {}),
        ("unclipped", base_model(tie_word_embeddings=True), {"max_grad_norm": 0.0}),
    ):
        trainer = make_trainer(model, name, max_steps=4, **options)
        moved = Moved()
        trainer.add_callback(moved)
        trainer.add_callback(LayerStatistics(trainer, every=1))
        stock_clip = trainer.accelerator.clip_grad_norm_
        trainer.train()
        assert trainer.accelerator.clip_grad_norm_ == stock_clip
        trained = model.merge_and_unload() if name == "lora" else model
        results[name] = {
            "weights": norms(dict(trained.named_parameters())),
            "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
            "moved": moved.norms,
        }
    # Averaged over an interval of 20 by default, or over what there is: the last step is recorded as well.
    trainer = make_trainer(base_model(), "default", max_steps=22, max_grad_norm=0.0)
    trainer.add_callback(LayerStatistics(trainer))
    trainer.train()
    results["default"] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    unwritable = make_trainer(base_model(), "unwritable", max_steps=1)
    Path("a file").touch()
    unwritable.add_callback(LayerStatistics(unwritable, "a file/layers.jsonl", every=1))
    unwritable.train()  # is worth more than its statistics
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29571",
    }
    zero_2 = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
    refused = make_trainer(base_model(), "refused", max_steps=1, deepspeed=zero_2)
    refused.add_callback(LayerStatistics(refused))
    try:
        refused.train()
    except EngineError as error:
        results["refused"] = str(error)
    return results


def under_zero3(folder: str) -> dict[str, Any]:
    """On two ranks: LISA stopped amid an interval and resumed, and LoRA."""
    import deepspeed
    import torch.distributed as dist

    import lisa_ds
    from lisa_ds.integrations.statistics import LayerStatistics

    os.chdir(folder)

    def config() -> dict[str, Any]:
        return {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}

    def by_lisa(resume: str | None = None, output_dir: str = "lisa") -> Any:
        trainer = make_trainer(
            base_model(), output_dir, max_steps=8, deepspeed=config(), save_strategy="steps", save_steps=5
        )
        trainer.add_callback(LayerStatistics(trainer, "lisa/layers.jsonl"))
        lisa_ds.attach(trainer, {"num_sampled_layers": 1, "interval_steps": 3})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    history = by_lisa().deepspeed.layer_history
    dist.barrier()
    first = statistics.read("lisa")
    dist.barrier()
    resumed = by_lisa("lisa/checkpoint-5").deepspeed
    second = statistics.read("lisa")
    lines = Path("lisa/layers.jsonl").read_text().count("\n")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree("lisa/checkpoint-5")
    model = lora_model()
    trainer = make_trainer(model, "lora", max_steps=3, deepspeed=config(), gradient_accumulation_steps=2)
    trainer.add_callback(LayerStatistics(trainer, every=1))
    trainer.train()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    merged = lora_model()
    merged.load_state_dict(whole, strict=False)
    return {
        "first": first,
        "second": second,
        "lines": lines,
        "history": [tuple(layers) for layers in history],
        "resumed_history": [tuple(layers) for layers in resumed.layer_history],
        "lora": norms(dict(merged.merge_and_unload().named_parameters())),
        "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
    }
