"""Stage d of the GPU proof: peaks and speed of whole models, method by method, beside what the planner says of each.

Random weights of the true configs in bf16 on one rank, as the paper's table 1 and figures 3 and 4 have them. Each arm is a process
of its own, forked after the libraries are imported, so that nothing of one is left for the next. `full` and `LoRA` run in stock
ZeRO-3, LISA in its engine; all on the same batch with gradient clipping and AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not

from benchmarks.gpu_claims import Claim, Report, at_most
from benchmarks.gpu_clock import Clock
from lisa_ds import records
from lisa_ds.config import LisaConfig, LoraConfig
from lisa_ds.memory import Architecture, RunSettings, catalogue, forecast

TINY, LLAMA2, LLAMA3 = "TinyLlama-1.1B-Chat-v1.0", "Llama-2-7b-hf", "Llama-3.1-8B"
STEPS = 4  # measured ones
ARM_S = 20  # no arm is begun with less time left
BUCKET = 2**24  # elements of the reduce bucket, for every method


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    model: str
    name: str
    method: str = "lisa"
    batch: int = 1
    sequence: int = 1024
    checkpointing: bool = False
    lisa: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name in records."""
        shape = f"{self.batch} x {self.sequence}{', checkpointing' if self.checkpointing else ''}"
        return f"{self.model}, {self.name}, {shape}"

    @property
    def lisa_config(self) -> LisaConfig:
        """Its LISA section; switches come when they are asked for."""
        return LisaConfig.load({"num_sampled_layers": 2, "interval_steps": 1000, **self.lisa})

    def settings(self) -> RunSettings:
        """The same for the planner."""
        return RunSettings(
            1, self.batch, self.sequence, method=self.method, lisa=self.lisa_config, lora=LoraConfig(rank=128),
            checkpointing=self.checkpointing, bucket_size=BUCKET,
        )  # fmt: skip


NEVER = {"embeddings": "never", "lm_head": "never"}
INT8 = {"optimizer": {"precision": "stochastic_rounding", "moments": "int8"}}
PAPER = {"optimizer": {"precision": "stochastic_rounding", "moments": "bf16"}}


def _arms(model: str, *, full: bool) -> list[Arm]:
    return [
        Arm(model, "LISA E+H+2L"),
        Arm(model, "LoRA r128", "lora"),
        *([Arm(model, "full", "full")] if full else []),
        Arm(model, "LISA E+H+4L", lisa={"num_sampled_layers": 4}),
        Arm(model, "LISA 2L, embeddings and head never", lisa=NEVER),
        Arm(model, "LISA E+H+2L, bf16 by stochastic rounding", lisa=PAPER),
        Arm(model, "LISA E+H+2L, 8-bit moments, no master", lisa=INT8),
    ]


ARMS = [
    *_arms(TINY, full=True),
    *_arms(LLAMA2, full=False),
    # As configs/recipes has them.
    Arm(LLAMA2, "recipe of 24 GB", checkpointing=True, lisa=INT8),
    Arm(LLAMA3, "recipe of 24 GB", checkpointing=True, lisa=NEVER | INT8),
    Arm(TINY, "recipe of 24 GB", batch=4),
    *_arms(LLAMA3, full=False),
]
TOY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip

OF_ARMS = {arm.title: at_most("d", f"{arm.title}: error of the planned peak", 0.05) for arm in ARMS}
CLAIMS: list[Claim] = list(OF_ARMS.values())


def main() -> None:
    """One arm after the other while there is time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="toy models on the CPU")
    parser.add_argument("--limit-s", type=float, default=180)
    parser.add_argument("--only", help="arms whose title contains this")
    parser.add_argument("--have", type=Path, help="records of arms that need not run again")
    parser.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.limit_s
    if arguments.arm is not None:
        print(json.dumps(_measure(ARMS[arguments.arm], arguments.dry_run)))
        sys.stdout.flush()
        os._exit(0)
    chosen = [arm for arm in ARMS if not arguments.only or arguments.only in arm.title]
    if arguments.have:
        had = {record.variant for record in records.read(arguments.have) if record.name == "peak"}
        chosen = [arm for arm in chosen if arm.title not in had]
    if arguments.dry_run:
        chosen = [arm for arm in chosen if arm.model == TINY][:3]  # one of each method
    _import_everything()
    forks = _can_fork(arguments.dry_run)
    report = Report(arguments.out, "d", dry_run=arguments.dry_run)
    for arm in chosen:
        if (left := deadline - time.monotonic()) < (0 if arguments.dry_run else ARM_S):
            print(f"d: {arm.title}: no time is left")
            continue
        with report.part(arm.title):
            run = _forked if forks else _started
            _record(report, arm, run(arm, arguments.dry_run, left))


def _import_everything() -> None:
    """What every arm needs, without touching CUDA."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cuda")
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401  # what imports it late finds tensors' constructors replaced by zero.Init
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import lisa_ds.engines.zero3  # noqa: F401


def _can_fork(dry_run: bool) -> bool:
    """Whether CUDA works in a forked child: nothing has touched it here."""
    if dry_run:
        return True
    child = os.fork()
    if not child:
        try:
            import torch

            torch.zeros(1, device="cuda")
            os._exit(0)
        except BaseException as error:
            print(f"arms are started one by one: {error}", flush=True)
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _forked(arm: Arm, dry_run: bool, left: float) -> dict[str, Any]:
    into, out = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(into)
            result = json.dumps(_measure(arm, dry_run))
        except BaseException as error:
            import traceback

            traceback.print_exc()
            result = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
        with os.fdopen(out, "w") as file:
            file.write(result)
        os._exit(0)
    os.close(out)
    with os.fdopen(into) as file:
        text = _within(left, file.read, child)
    os.waitpid(child, 0)
    return _checked(text)


def _within(seconds: float, read: Callable[[], str], child: int) -> str:
    import signal

    def stop(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, int(seconds)))
    try:
        return read()
    finally:
        signal.alarm(0)


def _started(arm: Arm, dry_run: bool, left: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--out", os.devnull, "--arm", str(ARMS.index(arm))]
    run = subprocess.run(command + ["--dry-run"] * dry_run, stdout=subprocess.PIPE, text=True, timeout=left)
    return _checked(run.stdout.strip().rpartition("\n")[2])


def _checked(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text) if text else {"error": "it was ended, or it crashed"}
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


def _measure(arm: Arm, dry_run: bool) -> dict[str, Any]:
    """Peaks of each phase and their times, in this process."""
    from benchmarks.gpu_engine import join_alone

    join_alone(dry_run)
    import torch
    from transformers import AutoConfig

    began = time.monotonic()
    config = TOY if dry_run else catalogue.require(arm.model)
    if dry_run:
        arm = replace(arm, sequence=32)
    engine = _build(arm, AutoConfig.for_model(**config, use_cache=False, max_position_embeddings=4096))
    built = time.monotonic() - began
    ids = torch.randint(0, config["vocab_size"], (arm.batch, arm.sequence), device=engine.device)
    clock = Clock(dry_run)
    loss: list[Any] = [None]

    def forward() -> None:
        loss[0] = engine(input_ids=ids, labels=ids).loss

    def backward() -> None:
        engine.backward(loss[0])
        loss[0] = None

    phases: dict[str, Callable[[], None]] = {"forward": forward, "backward": backward, "step": engine.step}
    for turn in range(2 + STEPS):
        for name, phase in phases.items():
            clock.measure(name, phase, counts=turn >= 2)
    found: dict[str, Any] = {"built_s": built, "sampled": getattr(engine, "sampled_layers", None)}
    if arm.method == "lisa":
        found["state"] = engine.memory_report()
        others = tuple((layer + 1) % config["num_hidden_layers"] for layer in engine.sampled_layers)
        clock.measure("switch", lambda: engine.switch_to(others))
        for name, phase in phases.items():  # what comes in has no moments before its first step
            clock.measure(name, phase, counts=False)
    return found | {"peaks": clock.peaks, "seconds": clock.seconds, "reserved": clock.reserved()}


def _build(arm: Arm, model_config: Any) -> Any:
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    import lisa_ds

    config = {
        "train_micro_batch_size_per_gpu": arm.batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": BUCKET},
        "steps_per_print": None,
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    if arm.method == "lora":
        from peft import LoraConfig, get_peft_model

        with deepspeed.zero.Init(config_dict_or_path=config):
            adapters = LoraConfig(r=128, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    model.train()
    if arm.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    if arm.method == "lisa":
        given = {"model": model, "optimizer": optimizer, "config": config}
        return lisa_ds.initialize(**given, lisa_config=arm.lisa_config)[0]
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _record(report: Report, arm: Arm, found: dict[str, Any]) -> None:
    architecture = Architecture.from_config(TOY if report.dry_run else catalogue.require(arm.model))
    sampled = tuple(found["sampled"]) if arm.method == "lisa" else None
    phases = forecast(architecture, arm.settings(), sampled).phases
    planned = {name: sum(phases[name].values()) for name in found["peaks"]}
    for name, peak in found["peaks"].items():
        report.write("peak_bytes", f"{arm.title}, {name}", peak, "B", planned=planned[name])
        report.write("seconds", f"{arm.title}, {name}", 0, "s", found["seconds"][name])
    whole = [
        sum(parts) for parts in zip(*(found["seconds"][name] for name in ("forward", "backward", "step")), strict=True)
    ]
    tokens = arm.batch * arm.sequence
    report.write("tokens_per_second", arm.title, 0, "tokens/s", [tokens / seconds for seconds in whole])
    peak, plan = max(found["peaks"].values()), max(planned.values())
    extra = {key: found[key] for key in ("state", "built_s", "sampled") if key in found}
    report.write("peak", arm.title, peak / 1e9, "GB", planned=plan / 1e9, reserved=found["reserved"] / 1e9, **extra)
    if peak:
        report.judge(OF_ARMS[arm.title], abs(plan / peak - 1), measured_GB=peak / 1e9, planned_GB=plan / 1e9)


def table(found: Sequence[records.Record]) -> list[str]:
    """A line of Markdown for every arm that was measured."""
    of = {(record.name, record.variant): record for record in found}
    lines = ["| | peak, GB | planned | reserved | tokens/s | switch, ms |", "|---|---|---|---|---|---|"]
    for arm in ARMS:
        peak = of.get(("peak", arm.title))
        if peak is None:
            continue
        speed, switch = of["tokens_per_second", arm.title], of.get(("seconds", f"{arm.title}, switch"))
        lines.append(
            f"| {arm.title} | {peak.value:.2f} | {peak.settings['planned']:.2f} | {peak.settings['reserved']:.2f} "
            f"| {speed.value:.0f} ({speed.low:.0f} to {speed.high:.0f}) | {f'{1e3 * switch.value:.1f}' if switch else ''} |"
        )
    return lines


if __name__ == "__main__":
    main()
