"""Seconds of a training step by method, interleaved: full fine-tuning, LoRA, GaLore, LISA with and without embeddings.

Usage: python benchmarks/method_steps.py --out docs/results/method_steps.jsonl [--ranks 2] [--rounds 20]

All engines live in the same ranks and take turns, a step each a round, on the same rows: SmolLM2-135M's shape with random weights, bf16,
four rows of 256 tokens of which the second half carries loss, logits where there are labels. LISA switches every five rounds. Forward, backward
and optimizer are timed apart, by the wall clock and by the CPU time of the process; a run's figure is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from a checkout, installed or not

from benchmarks.cpu_ranks import on_ranks
from lisa_ds import records

ARMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA r8": {"method": "lora", "rank": 8},
    "LoRA r128": {"method": "lora", "rank": 128},
    "LoRA r128, ZeRO-2": {"method": "lora", "rank": 128, "stage": 2},
    "GaLore r128": {"method": "galore", "rank": 128},
    "LISA, embeddings always": {"method": "lisa", "lisa": {"num_sampled_layers": 2, "interval_steps": 5}},
    "LISA, embeddings never": {"method": "lisa", "lisa": {"num_sampled_layers": 2, "interval_steps": 5, "embeddings": "never"}},
}  # fmt: skip
PHASES = ("forward", "backward", "optimizer")
ROWS, TOKENS, VOCABULARY = 4, 256, 49152


def main() -> None:
    """Start the ranks and record, or measure on this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; replaced if it exists")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.into is not None:
        arguments.into.write_text(json.dumps(measure(arguments.only, arguments.rounds)))
        os._exit(0)  # threads of libraries may abort an orderly exit, with all work done
    with tempfile.TemporaryDirectory() as folder:
        more = ["--rounds", str(arguments.rounds), "--only", *arguments.only]
        found = on_ranks(__file__, arguments.ranks, Path(folder), more)
    if arguments.out:
        arguments.out.unlink(missing_ok=True)
    base: dict[tuple[str, str], float] = {}
    for arm in arguments.only:
        for clock in ("wall", "cpu"):
            samples = [[round_[clock] for round_ in rank[arm]] for rank in found]
            steps = [max(sum(parts.values()) for parts in of_round) for of_round in zip(*samples, strict=True)]
            phases = {
                phase: records.spread([max(parts[phase] for parts in of_round) for of_round in zip(*samples, strict=True)]).value
                for phase in PHASES
            }  # fmt: skip
            spread = records.spread(steps)
            base.setdefault((clock, "full"), spread.value)
            parts = ", ".join(f"{phase} {value:.3f}" for phase, value in phases.items())
            print(
                f"{arm:26} {clock:4} {spread.value:6.3f} s [{spread.low:.3f}, {spread.high:.3f}] ({parts}); "
                f"{base[clock, 'full'] / spread.value:.2f} x {arguments.only[0]}"
            )
            if arguments.out:
                record(arguments, arm, clock, spread, phases)


def record(
    arguments: argparse.Namespace, arm: str, clock: str, spread: records.Spread, phases: dict[str, float]
) -> None:
    """Append a measurement."""
    records.append(
        arguments.out,
        records.Record(
            name=f"step_seconds/{clock}",
            variant=arm,
            value=spread.value,
            low=spread.low,
            high=spread.high,
            n=spread.n,
            unit="s",
            device=f"{arguments.ranks} x CPU, 1 thread each",
            commit=records.commit(),
            versions=records.versions((*records.PACKAGES, "peft", "galore-torch")),
            settings={**ARMS[arm], "phases": phases, "rows": ROWS, "tokens": TOKENS, "interleaved": arguments.only},
        ),
    )


def measure(arms: list[str], rounds: int) -> dict[str, Any]:
    """By arm, the seconds of each round by clock and phase, on this rank."""
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.set_num_threads(1)
    engines = {name: _Arm(**ARMS[name]) for name in arms}
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    rows = ROWS // int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {name: [] for name in arms}
    for index in range(-3, rounds):  # DeepSpeed learns the order of modules, moments are made
        ids = torch.randint(0, VOCABULARY, (rows, TOKENS), generator=generator)
        labels = ids.clone()
        labels[:, : TOKENS // 2] = -100
        for name, engine in engines.items():
            torch.distributed.barrier()
            times = engine.step(ids, labels)
            if index >= 0:
                found[name].append(times)
        if os.environ["RANK"] == "0":
            print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


class _Arm:
    """A model and its engine."""

    def __init__(self, method: str, *, rank: int = 0, stage: int = 3, lisa: dict[str, Any] | None = None) -> None:
        import deepspeed
        import torch
        from transformers import AutoConfig, LlamaForCausalLM

        import lisa_ds
        from lisa_ds.integrations.label_logits import LabelledLogits
        from lisa_ds.memory import catalogue

        torch.manual_seed(0)
        zero = {"stage": stage, "reduce_bucket_size": 2**24}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
        }
        sizes = AutoConfig.for_model(**catalogue.require("SmolLM2-135M"), use_cache=False)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=method != "galore" and stage == 3):
            model: Any = LlamaForCausalLM._from_config(sizes, dtype=torch.bfloat16)
        model.train()
        self._labelled = LabelledLogits.of(model, counts_items=False)
        if method == "lora":
            from peft import LoraConfig, get_peft_model

            made = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*layers.*_proj")
            model = get_peft_model(model, made, autocast_adapter_dtype=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._galore: Any = None
        if method == "galore":
            from galore_torch import GaLoreAdamW

            low = [p for name, p in model.named_parameters() if "layers" in name and p.dim() == 2]
            others = [p for p in trained if all(p is not weight for weight in low)]
            projection = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
            self._galore = GaLoreAdamW(
                [{"params": others}, {"params": low, **projection}], lr=1e-4, no_deprecation_warning=True
            )
            self._trained = trained
            self._engine: Any = torch.nn.parallel.DistributedDataParallel(model)
            return
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        kwargs: dict[str, Any] = {"model": model, "optimizer": optimizer, "config": config}
        if lisa is not None:
            self._engine, *_ = lisa_ds.initialize(**kwargs, lisa_config=lisa)
        else:
            self._engine, *_ = deepspeed.initialize(**kwargs)

    def step(self, ids: Any, labels: Any) -> dict[str, dict[str, float]]:
        """One step; seconds by clock and phase."""
        marks = [(time.perf_counter(), time.process_time())]

        def mark() -> None:
            marks.append((time.perf_counter(), time.process_time()))

        assert self._labelled is not None
        with self._labelled.only(labels):
            loss = self._engine(input_ids=ids, labels=labels).loss
        mark()
        if self._galore is None:
            self._engine.backward(loss)
            mark()
            self._engine.step()
        else:
            import torch

            loss.backward()
            mark()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._galore.step()
            self._galore.zero_grad()
        mark()
        return {
            clock: {phase: marks[i + 1][j] - marks[i][j] for i, phase in enumerate(PHASES)}
            for j, clock in enumerate(("wall", "cpu"))
        }


if __name__ == "__main__":
    main()
