"""The planner's peaks against the tensors of real runs, phase by phase.

Each run is a model of public size with random weights on real ZeRO-3 ranks: four steps, of which the third ends an interval. The
live bytes of every tensor are followed operation by operation; the resident set of the process is reported beside them.

    python benchmarks/plan_accuracy.py --out docs/results/plan_accuracy.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from a checkout, installed or not

from benchmarks.cpu_ranks import on_ranks
from lisa_ds import records
from lisa_ds.config import GaloreConfig, LisaConfig, LoraConfig
from lisa_ds.memory import Architecture, RunSettings, catalogue, forecast
from lisa_ds.memory.gather import GatherSettings
from lisa_ds.memory.matrices import shape_of
from lisa_ds.memory.state import KINDS, Precision, full_state_bytes, state_bytes

STEPS, INTERVAL = 4, 3


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    name: str
    model: str | dict[str, Any]
    world_size: int
    method: str = "lisa"
    batch: int = 1
    sequence: int = 256
    bf16: bool = True
    checkpointing: bool = False
    lisa: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    galore: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return self.model if isinstance(self.model, dict) else catalogue.require(self.model)

    @property
    def lisa_config(self) -> LisaConfig:
        """The run's LISA section."""
        given = {"num_sampled_layers": 2, "interval_steps": INTERVAL, **self.lisa}
        return LisaConfig.load({key: value for key, value in given.items() if value is not None})

    def settings(self) -> RunSettings:
        """The same run for the planner."""
        width = 2 if self.bf16 else 4
        keys = ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        gather = {key: self.zero[f"stage3_{key}"] for key in keys if f"stage3_{key}" in self.zero}
        return RunSettings(
            world_size=self.world_size,
            micro_batch=self.batch,
            sequence=self.sequence,
            method=self.method,
            lisa=self.lisa_config,
            lora=LoraConfig(**self.lora),
            galore=GaloreConfig(**self.galore),
            stage=self.zero.get("stage", 3),
            width=width,
            checkpointing=self.checkpointing,
            bucket_size=self.zero.get("reduce_bucket_size"),
            gather=GatherSettings(**gather),
            on_cpu=True,
        )


BUCKET = {"reduce_bucket_size": 2**24}
RUNS = [
    Run("SmolLM2-135M, LISA, 2 ranks", "SmolLM2-135M", 2, batch=2),
    Run("SmolLM2-135M, LISA, embeddings never, checkpointing, 2 ranks", "SmolLM2-135M", 2, batch=2, checkpointing=True,
        lisa={"embeddings": "never"}),
    Run("SmolLM2-135M, full, 2 ranks", "SmolLM2-135M", 2, "full", zero=BUCKET),
    Run("SmolLM2-135M, LISA, 8-bit moments, checkpointing, 4 ranks", "SmolLM2-135M", 4, checkpointing=True,
        lisa={"optimizer": {"moments": "int8"}}),
    Run("Qwen2.5-0.5B, LISA, 16-bit without master, 1 rank", "Qwen2.5-0.5B", 1, sequence=128,
        lisa={"num_sampled_layers": 4, "optimizer": {"precision": "stochastic_rounding", "moments": "bf16"}}),
    Run("GPT-2, LISA, fp32, 3 ranks", "gpt2", 3, sequence=128, bf16=False),
    Run("TinyLlama-1.1B, LISA, nothing held, 2 ranks", "TinyLlama-1.1B-Chat-v1.0", 2, sequence=128,
        zero={"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 10_000_000}),
    Run("TinyLlama-1.1B, LISA, all but blocks never, checkpointing, 2 ranks", "TinyLlama-1.1B-Chat-v1.0", 2,
        sequence=256, checkpointing=True, lisa={"embeddings": "never", "lm_head": "never", "rest": "never"}),
    Run("SmolLM2-135M, LISA matrices, 2 ranks", "SmolLM2-135M", 2, batch=2,
        lisa={"unit": "matrix", "sampling_ratio": 0.2, "num_sampled_layers": None}),
    Run("SmolLM2-135M, LISA matrices, embeddings never, checkpointing, 2 ranks", "SmolLM2-135M", 2, batch=2, checkpointing=True,
        lisa={"unit": "matrix", "embeddings": "never", "block_rest": "with_block"}),
    Run("SmolLM2-135M, LISA matrices and adapters r8, embeddings never, 2 ranks", "SmolLM2-135M", 2, batch=2,
        lisa={"unit": "matrix", "embeddings": "never", "adapters": {"rank": 8}}),
    Run("SmolLM2-135M, LoRA r8, 2 ranks", "SmolLM2-135M", 2, "lora", batch=2, lora={"rank": 8}, zero=BUCKET),
    Run("SmolLM2-135M, LoRA r128, 2 ranks", "SmolLM2-135M", 2, "lora", batch=2, lora={"rank": 128}, zero=BUCKET),
    Run("SmolLM2-135M, LoRA r128, ZeRO-2, 2 ranks", "SmolLM2-135M", 2, "lora", batch=2, lora={"rank": 128},
        zero={"stage": 2, **BUCKET}),
    Run("SmolLM2-135M, LoRA r8 on attention, ZeRO-2, checkpointing, 2 ranks", "SmolLM2-135M", 2, "lora", batch=2, checkpointing=True,
        lora={"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}, zero={"stage": 2, **BUCKET}),
    Run("SmolLM2-135M, LoRA r8 with dropout, 2 ranks", "SmolLM2-135M", 2, "lora", batch=2, lora={"rank": 8, "dropout": 0.1}, zero=BUCKET),
    Run("SmolLM2-135M, LoRA r8, DoRA, ZeRO-2, 2 ranks", "SmolLM2-135M", 2, "lora", batch=2, lora={"rank": 8, "dora": True},
        zero={"stage": 2, **BUCKET}),
    Run("SmolLM2-135M, GaLore r128, 2 ranks", "SmolLM2-135M", 2, "galore", batch=2, galore={"rank": 128}),
    Run("SmolLM2-135M, GaLore r128, 8-bit moments, 1 rank", "SmolLM2-135M", 1, "galore", batch=2,
        galore={"rank": 128, "moments": "int8"}),
    Run("SmolLM2-135M, GaLore r128, layerwise, checkpointing, 1 rank", "SmolLM2-135M", 1, "galore", batch=2, checkpointing=True,
        galore={"rank": 128, "layerwise": True}),
]  # fmt: skip


def measure(run: Run) -> dict[str, Any]:
    """Train on this rank; peaks of live tensor bytes by phase, and the model state of the step before the switch."""
    import deepspeed
    import torch
    import torch._dynamo  # what imports it late finds tensors' constructors replaced by zero.Init
    from transformers import AutoConfig, AutoModelForCausalLM

    import lisa_ds
    from benchmarks.live_bytes import LiveBytes
    from lisa_ds.engines.zero3.scoring.measure import measure as measure_scores

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    zero = {"stage": 3, **run.zero}
    config = {
        "train_micro_batch_size_per_gpu": run.batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": run.bf16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    model_config = AutoConfig.for_model(**run.config, use_cache=False)
    live = LiveBytes()
    ids = torch.randint(0, run.config["vocab_size"], (run.batch, run.sequence))

    def calibration(module: Any) -> Any:
        yield module(input_ids=ids, labels=ids).loss

    sharded = run.method != "galore" and zero["stage"] == 3
    with live:
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=sharded):
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16 if run.bf16 else torch.float32)
        model.train()
        if run.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if run.method == "lora":
            model = _with_adapters(run, model)
        if "adapters" in run.lisa:
            model = lisa_ds.add_adapters(model, run.lisa_config)
        with live.phase("init"):
            if run.method == "galore":
                engine: Any = _Ddp(run, model)
            else:
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as transformers' default
                kwargs: dict[str, Any] = {"model": model, "optimizer": optimizer, "config": config}
                if run.method == "lisa":
                    engine, *_ = lisa_ds.initialize(**kwargs, lisa_config=run.lisa_config, calibration=calibration)
                else:
                    engine, *_ = deepspeed.initialize(**kwargs)
        count = _count(run, engine)
        if run.method == "lisa":
            _follow_switch(engine, live)
        sampled: tuple[int, ...] = ()
        state: dict[str, int] = {}
        for step in range(STEPS):
            # From the second step on DeepSpeed knows the order of the modules, and moments exist.
            settled = step in (1, 2)
            sampled = getattr(engine, "sampled_layers", ()) if step == 1 else sampled
            with live.phase("forward" if settled else "-"):
                loss = engine(input_ids=ids, labels=ids).loss
            with live.phase("backward" if settled else "-"):
                engine.backward(loss)
            del loss
            # Layerwise each parameter is stepped in backward.
            with live.phase("step" if step == 1 and not run.galore.get("layerwise") else "-"):
                engine.step()
            if step == 1:
                state = count()
            if step == 1 and run.lisa_config.sampler.calibrates:
                with live.phase("scores"):
                    measure_scores(engine, run.lisa_config, calibration)
    return {
        "peaks": {phase: peak for phase, peak in live.peaks.items() if phase != "-"},
        "state": state,
        "sampled": sampled,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _with_adapters(run: Run, model: Any) -> Any:
    from peft import LoraConfig as Adapters
    from peft import get_peft_model

    from lisa_ds.config.targets import chosen
    from lisa_ds.models.linears import all_linears

    settings = run.settings().lora
    paths = [path for path in all_linears(model, conv1d=True) if chosen(settings.targets, path, inside=False)]
    made = Adapters(
        r=settings.rank,
        lora_alpha=settings.scale_numerator,
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        target_modules=paths,
    )
    return get_peft_model(model, made, autocast_adapter_dtype=False)


def _count(run: Run, engine: Any) -> Any:
    """A function that counts the model state of an engine."""
    from lisa_ds.engines.zero2.memory_report import StepWatch
    from lisa_ds.engines.zero3.watch.memory_report import memory_report

    if run.method == "galore":
        return engine.state
    if run.zero.get("stage") == 2:
        return StepWatch(engine.optimizer, engine.module.parameters()).bytes
    return lambda: memory_report(engine.optimizer, engine.module.parameters())


class _Ddp:
    """GaLore on DDP, with an engine's three calls."""

    def __init__(self, run: Run, model: Any) -> None:
        from types import SimpleNamespace

        import torch

        from lisa_ds.integrations import galore
        from lisa_ds.integrations.live_state import LiveState
        from lisa_ds.models.linears import all_linears

        settings = run.settings().galore
        args = SimpleNamespace(
            learning_rate=1e-4,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            device=torch.device("cpu"),
            world_size=run.world_size,
        )
        trainer: Any = SimpleNamespace(
            model=model, args=args, optimizer=None, deepspeed=None, is_deepspeed_enabled=False, create_optimizer=None,
            get_decay_parameter_names=lambda model: [], accelerator=SimpleNamespace(state=SimpleNamespace()),
        )  # fmt: skip
        self._live = LiveState(trainer)
        targets = [module.weight for module in all_linears(model, conv1d=False).values()]
        kept = ("rank", "update_proj_gap", "scale", "proj_type")
        galore.install(
            trainer,
            targets,
            projection={key: getattr(settings, key) for key in kept},
            int8=settings.moments == "int8",
            layerwise=settings.layerwise,
        )
        self._optimizer = trainer.create_optimizer()
        self._model = torch.nn.parallel.DistributedDataParallel(model) if run.world_size > 1 else model
        trainer.model_wrapped = self._model

    def __call__(self, **batch: Any) -> Any:
        return self._model(**batch)

    def backward(self, loss: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, int]:
        return self._live.bytes()


def _follow_switch(engine: Any, live: Any) -> None:
    switch = engine.optimizer.switch

    def followed(*units: Any) -> None:
        with live.phase("switch"):
            switch(*units)

    engine.optimizer.switch = followed


def planned(run: Run, sampled: tuple[int, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """The planner's peaks by phase, and its model state, for the draw that was measured."""
    architecture = Architecture.from_config(run.config)
    settings = run.settings()
    phases = forecast(architecture, settings, sampled if run.method == "lisa" else None).phases
    optimizer = settings.lisa.optimizer
    precision = Precision(
        settings.width,
        settings.gradient_width,
        master_bytes=4 if optimizer.precision == "mixed" else 0,
        moments=optimizer.moments,
        bucket_bytes=phases["step"].get("buckets", 0),
    )
    shape = shape_of(architecture, settings.lisa) if run.method == "lisa" else architecture.shape
    if run.method in ("lora", "galore"):
        parts = phases["step"]
        state = dict.fromkeys(KINDS, 0) | {
            key: parts.get(key, 0) for key in ("weights", "gradients", "master", "moments", "buckets")
        }
    elif run.method == "full":
        state = full_state_bytes(shape, world_size=run.world_size, precision=precision)
    else:
        state = state_bytes(
            shape, sampled=sampled, world_size=run.world_size, config=settings.lisa, precision=precision
        )
    return {phase: sum(parts.values()) for phase, parts in phases.items()}, state


def main() -> None:
    """Measure every run, or one on this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of records")
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        arguments.into.write_text(json.dumps(measure(RUNS[arguments.measure])))
        os._exit(0)  # threads of libraries may abort an orderly exit, with all work done
    if arguments.out:
        arguments.out.unlink(missing_ok=True)
    for run in RUNS:
        if arguments.only and arguments.only not in run.name:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            measured = on_ranks(__file__, run.world_size, Path(folder), ["--measure", str(RUNS.index(run))])
        first = measured[0]
        phases, state = planned(run, tuple(first["sampled"]))
        if "moments" in state:  # both in one
            counted = first["state"]
            counted["moments"] = counted.pop("exp_avg") + counted.pop("exp_avg_sq")
            counted.pop("buckets")  # DDP's are its own
        wrong = {kind: (state[kind], size) for kind, size in first["state"].items() if state[kind] != size}
        print(f"{run.name} ({time.perf_counter() - start:.0f} s): model state {wrong or 'exact'}")
        peaks = first["peaks"]
        for phase, peak in peaks.items():
            print(f"  {phase:9} planned {phases[phase] / 1e6:9.1f} MB, live {peak / 1e6:9.1f} MB, "
                  f"{100 * (phases[phase] / peak - 1):+.2f} %")  # fmt: skip
        most, live = max(phases[phase] for phase in peaks), max(peaks.values())
        print(f"  peak      planned {most / 1e6:9.1f} MB, live {live / 1e6:9.1f} MB, {100 * (most / live - 1):+.2f} %; "
              f"resident {first['resident'] / 1e6:.1f} MB", flush=True)  # fmt: skip
        if arguments.out:
            _record(arguments.out, run, phases, state, first)


def _record(out: Path, run: Run, phases: dict[str, int], state: dict[str, int], measured: dict[str, Any]) -> None:
    settings = {
        **{key: getattr(run, key) for key in ("world_size", "method", "batch", "sequence", "bf16", "checkpointing")},
        **{"model": run.config, "lisa": run.lisa, "zero": run.zero, "sampled": measured["sampled"]},
    }
    peaks = measured["peaks"]
    values = {
        **{f"peak_bytes/{phase}": (peak, phases[phase]) for phase, peak in peaks.items()},
        "peak_bytes": (max(peaks.values()), max(phases[phase] for phase in peaks)),
        **{f"state_bytes/{kind}": (size, state[kind]) for kind, size in measured["state"].items()},
        "resident_bytes": (measured["resident"], None),
    }
    common = {"unit": "B", "device": f"{run.world_size} x CPU", "commit": records.commit()}
    for name, (live, plan) in values.items():
        for variant, value in (("live", live), ("planned", plan)):
            if value is not None:
                records.append(
                    out,
                    records.Record(
                        name=name, variant=f"{run.name}, {variant}", value=value, versions=records.versions(),
                        settings=settings, **common,
                    ),
                )  # fmt: skip


if __name__ == "__main__":
    main()
