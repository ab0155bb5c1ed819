"""Host time of a step and of a switch by unit of sampling: 30 blocks against the 210 matrices in them, at equal state.

Usage: python benchmarks/unit_cost.py --out docs/results/unit_cost.jsonl [--ranks 2] [--rounds 60]

A Llama of 30 narrow layers, so that what is left is Python's and DeepSpeed's time. Both engines live in the same ranks and take turns, a
step each a round, on the same rows; both draw anew at every step, two layers or as many elements of single matrices. Seconds are CPU time
of the process, of the slowest rank; those of a step are without its switch, which includes the draw and its comparison on all ranks.
"""

from __future__ import annotations

import argparse
import itertools
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

BESIDE = {"lm_head": "never", "rest": "never"}  # the embeddings train, so that backward runs through all layers in both
ARMS: dict[str, dict[str, Any]] = {
    "30 blocks": {"unit": "block", **BESIDE},
    "210 matrices": {"unit": "matrix", "block_rest": "never", **BESIDE},
}
PARTS = ("forward", "backward", "optimizer", "switch", "step")
LAYERS, HIDDEN, ROWS, TOKENS, VOCABULARY = 30, 64, 1, 16, 256


def main() -> None:
    """Start the ranks and record, or measure on this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; replaced if it exists")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--profile", action="store_true", help="print where rank 0 spends a matrix engine's time")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.into is not None:
        arguments.into.write_text(json.dumps(measure(arguments.rounds, profiled=arguments.profile)))
        os._exit(0)  # threads of libraries may abort an orderly exit, with all work done
    more = ["--rounds", str(arguments.rounds), *(["--profile"] if arguments.profile else [])]
    with tempfile.TemporaryDirectory() as folder:
        found = on_ranks(__file__, arguments.ranks, Path(folder), more)
    if arguments.out:
        arguments.out.unlink(missing_ok=True)
    base: dict[str, float] = {}
    for arm in ARMS:
        for part in PARTS:
            rounds = zip(*([times[part] for times in rank[arm]] for rank in found), strict=True)
            spread = records.spread([max(of_round) for of_round in rounds])
            base.setdefault(part, spread.value)
            print(
                f"{arm:14} {part:10} {1e3 * spread.value:7.2f} ms [{1e3 * spread.low:.2f}, {1e3 * spread.high:.2f}], "
                f"{spread.value / base[part]:.2f} x {next(iter(ARMS))}"
            )
            if arguments.out:
                record(arguments, arm, part, spread)


def record(arguments: argparse.Namespace, arm: str, part: str, spread: records.Spread) -> None:
    """Append a measurement."""
    records.append(
        arguments.out,
        records.Record(
            name=f"host_seconds/{part}",
            variant=arm,
            value=spread.value,
            low=spread.low,
            high=spread.high,
            n=spread.n,
            unit="s",
            device=f"{arguments.ranks} x CPU, 1 thread each",
            commit=records.commit(),
            versions=records.versions(),
            settings={**ARMS[arm], "layers": LAYERS, "hidden": HIDDEN, "interleaved": list(ARMS)},
        ),
    )


def measure(rounds: int, *, profiled: bool) -> dict[str, Any]:
    """By arm, the seconds of each round by part, on this rank."""
    import cProfile
    import pstats

    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.set_num_threads(1)
    engines = {name: _Arm(lisa) for name, lisa in ARMS.items()}
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    found: dict[str, Any] = {name: [] for name in ARMS}
    profile = cProfile.Profile()
    for index in range(-5, rounds):  # DeepSpeed learns the order of modules
        ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)
        for name, engine in engines.items():
            torch.distributed.barrier()
            watched = profiled and index >= 0 and name == list(ARMS)[-1]
            if watched:
                profile.enable()
            times = engine.step(ids)
            profile.disable()
            if index >= 0:
                found[name].append(times)
    if profiled and os.environ["RANK"] == "0":
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    return found


class _Arm:
    """A model and its engine."""

    def __init__(self, lisa: dict[str, Any]) -> None:
        import deepspeed
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        import lisa_ds

        torch.manual_seed(0)
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3},
        }
        sizes = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_cache=False,
        )
        with deepspeed.zero.Init(config_dict_or_path=config):
            model: Any = LlamaForCausalLM._from_config(sizes, dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._engine, *_ = lisa_ds.initialize(
            model=model.train(),
            optimizer=optimizer,
            config=config,
            lisa_config={"num_sampled_layers": 2, "interval_steps": 1, **lisa},
        )
        self._switching = 0.0
        count_step = self._engine.count_step

        def timed() -> bool:
            begin = time.process_time()
            drawn: bool = count_step()
            self._switching += time.process_time() - begin
            return drawn

        self._engine.count_step = timed

    def step(self, ids: Any) -> dict[str, float]:
        """One step; CPU seconds by part."""
        self._switching, marks = 0.0, [time.process_time()]
        loss = self._engine(input_ids=ids, labels=ids).loss
        marks.append(time.process_time())
        self._engine.backward(loss)
        marks.append(time.process_time())
        self._engine.step()
        marks.append(time.process_time())
        forward, backward, last = (after - before for before, after in itertools.pairwise(marks))
        own = last - self._switching
        parts = {"forward": forward, "backward": backward, "optimizer": own, "switch": self._switching}
        return {**parts, "step": forward + backward + own}


if __name__ == "__main__":
    main()
