"""Held-out loss after LISA fine-tuning of a real model, by what the optimizer keeps its state in; seeds are paired.

Usage: python benchmarks/optimizer_quality.py --out docs/results/optimizer_quality.jsonl [--seeds 0 1] [--steps 200]

Every run of a seed starts from the same weights (SmolLM2-135M in bf16), sees the same rows of the built-in corpus in the same order
and trains the same layers; only `precision` and `moments` differ. A run whose record is in the file already is not repeated, and
when all are there the differences to `mixed` are printed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisa_ds import LayerSampler, LayerStack, LisaConfig, MaskedAdamW, data, records
from lisa_ds.config import DataConfig, ModelConfig
from lisa_ds.models import load_model, load_tokenizer

MODES = {
    "mixed": {"precision": "mixed", "moments": "fp32"},
    "sr_fp32_moments": {"precision": "stochastic_rounding", "moments": "fp32"},
    "sr_16bit": {"precision": "stochastic_rounding", "moments": "bf16"},
    "int8_master": {"precision": "mixed", "moments": "int8"},
    "int8_sr": {"precision": "stochastic_rounding", "moments": "int8"},
}
MODEL = ModelConfig(name_or_path="builtin:smollm2-135m")
DATA = DataConfig(path="builtin:stdlib-docs", eval_split="test", eval_max_rows=128, max_length=64)
LISA = {"num_sampled_layers": 2, "interval_steps": 10}
EMBEDDINGS_LR_SCALE = 0.1
BOUND = 0.005


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    train_rows, eval_rows = data.load_dataset(DATA, tokenizer)
    collate = data.collator(tokenizer)
    for seed in arguments.seeds:
        for mode in arguments.modes:
            settings = {"seed": seed, "steps": arguments.steps, "batch": arguments.batch, "lr": arguments.lr}
            if arguments.out.exists() and any(
                r.variant == mode and r.settings == settings for r in records.read(arguments.out)
            ):
                continue
            start = time.perf_counter()
            loss = run(mode, train_rows, eval_rows, collate, **settings)
            record = records.Record(
                name="held_out_loss",
                variant=mode,
                value=loss,
                unit="nats",
                x=arguments.steps,
                x_label="step",
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                commit=records.commit(),
                versions=records.versions(),
                settings=settings,
            )
            records.append(arguments.out, record)
            print(f"{mode:16} seed {seed}: {loss:.4f} after {time.perf_counter() - start:.0f} s", flush=True)
    compare(list(records.read(arguments.out)))


def run(
    mode: str, train_rows: Any, eval_rows: Any, collate: Any, *, seed: int, steps: int, batch: int, lr: float
) -> float:
    """Fine-tune once; the held-out loss per token afterwards."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = load_model(MODEL, torch.bfloat16).to(device)
    model.train()
    stack = LayerStack.from_model(model)
    sampler = LayerSampler(len(stack.layers), LisaConfig(**LISA, seed=seed))
    always = [*stack.embeddings, *stack.lm_head]
    blocks = [list(block.parameters()) for block in stack.layers]
    optimizer = MaskedAdamW(
        [
            {"params": always, "lr_scale": EMBEDDINGS_LR_SCALE},
            {"params": [*stack.rest, *(p for block in blocks for p in block)]},
        ],
        lr=lr,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        **MODES[mode],  # type: ignore[arg-type]
    )
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(seed)).tolist()
    sampled: tuple[int, ...] = ()
    for step in range(steps):
        if step % LISA["interval_steps"] == 0:
            sampled = switch(optimizer, blocks, sampler.layers_at(step // LISA["interval_steps"]))
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        rows = [train_rows[i] for i in order[step * batch : (step + 1) * batch]]
        labelled_loss(model, collate(rows), device).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"{mode} seed {seed}: step {step + 1} of {steps}, layers {sampled}", file=sys.stderr, flush=True)
    return held_out(model, eval_rows, collate, device)


def switch(optimizer: MaskedAdamW, blocks: list[list[Tensor]], sampled: tuple[int, ...]) -> tuple[int, ...]:
    """Train ``sampled``; what leaves drops its state, its master copy with it."""
    for i, block in enumerate(blocks):
        for parameter in block:
            parameter.requires_grad_(i in sampled)
            if i not in sampled:
                optimizer.state.pop(parameter, None)
    return sampled


def schedule(step: int, steps: int) -> float:
    """A tenth of the steps up, the rest down by a cosine to a tenth of the rate."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def labelled_loss(model: Any, batch: Any, device: str, reduction: str = "mean") -> Tensor:
    """Cross-entropy at the labelled positions, whose logits alone are computed."""
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).to(device)
    kept = labels != -100
    hidden = model.model(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
    ).last_hidden_state
    logits = model.lm_head(hidden[kept]).float()
    return torch.nn.functional.cross_entropy(logits, labels[kept], reduction=reduction)


@torch.no_grad()
def held_out(model: Any, rows: Any, collate: Any, device: str) -> float:
    """Mean loss of a labelled token."""
    model.eval()
    total, count = 0.0, 0
    for i in range(0, len(rows), 16):
        batch = collate([rows[j] for j in range(i, min(i + 16, len(rows)))])
        total += float(labelled_loss(model, batch, device, "sum"))
        count += int((batch["labels"][:, 1:] != -100).sum())
    return total / count


def compare(measured: list[records.Record]) -> None:
    """Differences to ``mixed`` at the same seed."""
    losses = {(r.variant, r.settings["seed"]): r.value for r in measured}
    seeds = sorted({seed for _, seed in losses})
    print(f"{'mode':16} " + " ".join(f"{f'seed {seed}':>9}" for seed in seeds) + "   mean difference to mixed")
    for mode in MODES:
        both = [seed for seed in seeds if (mode, seed) in losses and ("mixed", seed) in losses]
        if not both:
            continue
        differences = [losses[mode, seed] - losses["mixed", seed] for seed in both]
        mean = sum(differences) / len(differences)
        verdict = "" if mode == "mixed" else ("within" if abs(mean) <= BOUND else "not within")
        values = " ".join(f"{losses[mode, seed]:9.4f}" for seed in both)
        print(f"{mode:16} {values}   {mean:+.4f} {verdict} {BOUND if verdict else ''}")


if __name__ == "__main__":
    main()
