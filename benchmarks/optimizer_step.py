"""The optimizer's part of an engine's step: one launch, and Stage 3's own pass over the same window with torch's AdamW.

Usage: python benchmarks/optimizer_step.py --out docs/results/optimizer_step.jsonl

One rank, one process, bf16, the engines interleaved: each trains a SmolLM2-135M-shaped model with random weights, of which the
embeddings and two blocks are in the window. Timed is `optimizer.step()` of the ZeRO-3 optimizer: norm, clipping, update, weights
back in place. Backward is real, but on so few tokens that it costs little.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lisa_ds
from lisa_ds import records

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # variant: the LISA section's optimizer, and arguments of torch.optim.AdamW
    "stage3_torch_adamw": ({"name": "adamw"}, {}),
    "stage3_torch_fused": ({"name": "adamw"}, {"fused": True}),
    "mixed": ({"name": "masked_adamw"}, {}),
    "sr_16bit": ({"precision": "stochastic_rounding", "moments": "bf16"}, {}),
    "int8_master": ({"moments": "int8"}, {}),
    "int8_sr": ({"precision": "stochastic_rounding", "moments": "int8"}, {}),
}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; replaced if it exists")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29561")
    torch.set_num_threads(arguments.threads)
    cuda = torch.cuda.is_available()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    torch.set_num_threads(arguments.threads)  # DeepSpeed has changed it
    engines = {name: build(*VARIANTS[name]) for name in arguments.only}
    rows = torch.randint(0, 1000, (1, 8), device="cuda" if cuda else "cpu")
    times: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(-3, arguments.rounds):
        for name, engine in engines.items():
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            seconds = timed_step(engine, cuda)
            if index >= 0:
                times[name].append(seconds)
        if index >= 0 and (index + 1) % 10 == 0:
            print(f"round {index + 1} of {arguments.rounds}", file=sys.stderr)
    report = engines[arguments.only[0]].memory_report()
    elements = report["master"] // 4
    arguments.out.unlink(missing_ok=True)
    medians = {}
    for name, samples in times.items():
        spread = records.spread([1e3 * sample for sample in samples])
        medians[name] = spread.value
        records.append(
            arguments.out,
            records.Record(
                name="optimizer_step",
                variant=name,
                value=spread.value,
                low=spread.low,
                high=spread.high,
                n=spread.n,
                unit="ms",
                device=torch.cuda.get_device_name() if cuda else f"CPU, {arguments.threads} threads",
                commit=records.commit(),
                versions=records.versions(),
                settings={"elements": elements, "model": "SmolLM2-135M shape", "num_sampled_layers": 2},
            ),
        )
        faster = medians[arguments.only[0]] / spread.value
        print(
            f"{name:20} {spread.value:8.1f} ms ({spread.low:.1f} to {spread.high:.1f}, n={spread.n})  {faster:5.2f} x"
        )


def build(optimizer: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """An engine whose window holds embeddings, two blocks and the norm."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-6, **arguments),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3},
            "steps_per_print": None,
        },
        lisa_config={"num_sampled_layers": 2, "interval_steps": 10**9, "optimizer": optimizer},
    )
    return engine


def timed_step(engine: Any, cuda: bool) -> float:
    """Seconds inside the ZeRO-3 optimizer's step."""
    step, spent = engine.optimizer.step, [0.0]

    def timed(*args: Any, **kwargs: Any) -> None:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        spent[0] = time.perf_counter() - start

    engine.optimizer.step = timed
    try:
        engine.step()
    finally:
        engine.optimizer.step = step
    return spent[0]


if __name__ == "__main__":
    main()
