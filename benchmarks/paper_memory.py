"""The LISA paper's first table, as the planner has it; and a table by unit of sampling and moments.

    python benchmarks/paper_memory.py --out docs/results/paper_memory.jsonl

The paper (arXiv:2403.17919, table 1) trains in bf16 throughout: weights, gradients and both moments are of 2 bytes, and there is
no fp32 master copy. It does not say how long its rows are; 1,024 tokens are planned here, one row a batch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from a checkout, installed or not

from lisa_ds import records
from lisa_ds.config import LisaConfig, LoraConfig
from lisa_ds.memory import Architecture, RunSettings, catalogue, forecast

BF16 = {"optimizer": {"precision": "stochastic_rounding", "moments": "bf16"}}
RANKS_OF_LORA = (128, 256, 512)
LAYERS = (0, 2, 4)
COLUMNS = ("vanilla", *(f"LoRA r{rank}" for rank in RANKS_OF_LORA), "E+H", "E+H+2L", "E+H+4L")
# Model, ranks, and the paper's figures in GB for the columns above; None: out of memory.
ROWS = [
    ("GPT2-Small", "gpt2", 1, (3.8, 3.3, 3.5, 3.7, 3.3, 3.3, 3.4)),
    ("TinyLlama", "TinyLlama-1.1B-Chat-v1.0", 1, (13, 7.9, 8.6, 10, 7.4, 8.0, 8.3)),
    ("Phi-2", "phi-2", 1, (28, 14.3, 15.5, 18, 13.5, 14.6, 15)),
    ("Mistral-7B", "Mistral-7B-v0.1", 1, (59, 23, 26, 28, 21, 23, 24)),
    ("LLaMA-2-7B", "Llama-2-7b-hf", 1, (59, 23, 26, 28, 21, 23, 24)),
    ("LLaMA-2-70B", "Llama-2-70b-hf", 4, (None, 79, None, None, 71, 75, 79)),
]


# The second table: units and moments, of the models that matter for memory; with activation checkpointing and a bf16 model.
NEVER = {"embeddings": "never", "lm_head": "never"}
SIGN = {"moments": "none"}
UNITS = {
    "full": None,
    "2 blocks": {"num_sampled_layers": 2},
    "2 blocks, E and H never": {"num_sampled_layers": 2, **NEVER},
    "matrices 0.07, E and H never": {"unit": "matrix", "sampling_ratio": 0.07, **NEVER},
    "matrices 0.2, E and H never": {"unit": "matrix", "sampling_ratio": 0.2, **NEVER},
    "the same, moments none": {"unit": "matrix", "sampling_ratio": 0.2, **NEVER, "optimizer": SIGN},
    "the same, no master": {"unit": "matrix", "sampling_ratio": 0.2, **NEVER, "optimizer": {**SIGN, "precision": "stochastic_rounding"}},
    "matrices 0.07, adapters r8": {"unit": "matrix", "sampling_ratio": 0.07, **NEVER, "adapters": {"rank": 8}},
}  # fmt: skip
MODELS = (("LLaMA-2-7B", "Llama-2-7b-hf", 1), ("LLaMA-2-70B", "Llama-2-70b-hf", 4))


def by_unit(model: str, ranks: int) -> dict[str, tuple[float, float]]:
    """GB on a rank by row of the second table: at the peak, and of gradients, master copy and moments."""
    architecture = Architecture.from_config(catalogue.require(model))
    run = RunSettings(ranks, 1, 1024, checkpointing=True, bucket_size=0 if ranks == 1 else None)
    found = {}
    for name, fields in UNITS.items():
        own = replace(run, method="full") if fields is None else replace(run, lisa=LisaConfig.load(fields))
        plan = forecast(architecture, own)
        state = sum(plan.phases["step"].get(part, 0) for part in ("gradients", "master", "moments"))
        found[name] = plan.peak / 1e9, state / 1e9
    return found


def planned(model: str, ranks: int) -> dict[str, float]:
    """GB on a rank, by column."""
    architecture = Architecture.from_config(catalogue.require(model))

    # One rank reduces nothing: the bucket is left out as the paper's code has none.
    run = RunSettings(ranks, 1, 1024, bucket_size=0 if ranks == 1 else None)

    def in_bf16(run: RunSettings) -> int:
        """What is trained without a master copy and without a cast to fp32, and with moments of 2 bytes instead of 4."""
        phases = forecast(architecture, run).phases.values()
        share = {"master": 0.0, "scratch": 0.0, "moments": 0.5}
        return max(int(sum(share.get(part, 1.0) * size for part, size in parts.items())) for parts in phases)

    found = {"vanilla": in_bf16(replace(run, method="full"))}
    for rank in RANKS_OF_LORA:
        found[f"LoRA r{rank}"] = in_bf16(replace(run, method="lora", lora=LoraConfig(rank=rank)))
    for count, column in zip(LAYERS, COLUMNS[-len(LAYERS) :], strict=True):
        lisa = LisaConfig.load(BF16 | {"num_sampled_layers": max(count, 1)})
        found[column] = forecast(architecture, replace(run, lisa=lisa), sampled=range(count)).peak
    return {column: size / 1e9 for column, size in found.items()}


def main() -> None:
    """Print the table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of records")
    out = parser.parse_args().out
    if out:
        out.unlink(missing_ok=True)
    print(f"| GB, planned (paper) | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, model, ranks, paper in ROWS:
        found = planned(model, ranks)
        cells = [
            f"{found[column]:.1f} ({figure or 'out of memory'})" for column, figure in zip(COLUMNS, paper, strict=True)
        ]
        print(f"| {name}{f', {ranks} ranks' if ranks > 1 else ''} | {' | '.join(cells)} |")
        for column, figure in zip(COLUMNS, paper, strict=True):
            if out:
                write(out, "planned_peak", f"{name}, {column}", found[column], {"ranks": ranks, "paper": figure})
    tables = {name: by_unit(model, ranks) for name, model, ranks in MODELS}
    heads = [f"{name}{f', {ranks} ranks' if ranks > 1 else ''}" for name, _, ranks in MODELS]
    print(f"\n| GB, planned: peak (state) | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for row, fields in UNITS.items():
        print(f"| {row} | {' | '.join('{:.1f} ({:.2f})'.format(*tables[name][row]) for name, _, _ in MODELS)} |")
        for name, _, ranks in MODELS:
            for kind, value in zip(("planned_peak", "planned_state"), tables[name][row], strict=True):
                if out:
                    write(out, kind, f"{name}, {row}", value, {"ranks": ranks, "lisa": fields, "checkpointing": True})


def write(out: Path, name: str, variant: str, value: float, settings: dict[str, Any]) -> None:
    """Append a figure."""
    records.append(
        out,
        records.Record(
            name=name, variant=variant, value=value, unit="GB", device="none",
            commit=records.commit(), versions=records.versions(), settings=settings,
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
