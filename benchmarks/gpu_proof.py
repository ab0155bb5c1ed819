"""Every claim about a GPU, measured by one command in eight minutes.

    python benchmarks/gpu_proof.py --out RESULTS [--budget-s 480] [--stages a,c] [--arms FILE] [--dry-run]

Stages run in order of worth, each in a process of its own under its own time limit; one that fails or hangs does not stop the next, and
what it had measured is on disk by then. With less time than all of them need, the last ones are cut. It ends with a table of claims:
held, missed, or not run. `--report FILES` writes that table again from records. `--arms` names training runs to compare, which take
what time the others leave; gpu_arms.py says how such a file looks, and goes on where its records stop.

The machine needs torch, transformers, peft, pytest and DeepSpeed, but neither make nor a network; it may be run from a copy of
the checkout without its history, with `--commit` naming what it is a copy of. On a machine without a GPU `--dry-run` runs
every stage's code at toy size.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not

from benchmarks import gpu_arms, gpu_engine, gpu_kernels, gpu_models, gpu_smoke
from benchmarks.gpu_claims import Claim, table
from lisa_ds import records

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """One script of the proof."""

    letter: str
    script: str
    limit_s: float
    claims: list[Claim]


STAGES = [
    Stage("a", "gpu_smoke", 150, gpu_smoke.CLAIMS),
    Stage("b", "gpu_engine", 120, gpu_engine.CLAIMS),
    Stage("c", "gpu_kernels", 60, gpu_kernels.CLAIMS),
    Stage("d", "gpu_models", 200, gpu_models.CLAIMS),
    Stage("e", "gpu_arms", 600, gpu_arms.CLAIMS),
]
LEAST_S = 10  # no stage is begun with less time left
NEEDED = ("torch", "transformers", "deepspeed", "peft", "pytest", "ninja", "pydantic", "datasets", "triton")
BUILDS = {
    "cuda": "from lisa_ds.ops import build; build.library('cuda')",
    "cpu": "from lisa_ds.ops import build; build.library('cpu')",
    "FusedAdam": "from deepspeed.ops.op_builder import FusedAdamBuilder; FusedAdamBuilder().load()",
}


def main() -> int:
    """Run the stages, and say what became of the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for records and logs")
    parser.add_argument("--budget-s", type=float, default=480)
    parser.add_argument("--stages", default="a,b,c,d,e", help="these, such as a,c")
    parser.add_argument(
        "--arms", type=Path, help="file of the runs that stage e compares; without it there is no stage e"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--commit", default=records.commit(), help="of the checkout this is a copy of")
    parser.add_argument("--report", nargs="+", type=Path, help="only print the table of these records")
    arguments = parser.parse_args()
    if arguments.report:
        print("\n".join(tables([record for path in arguments.report for record in records.read(path)])))
        return 0
    if arguments.out is None:
        parser.error("--out or --report is needed")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"not installed here: {', '.join(missing)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    environment = _environment(arguments.commit, arguments.dry_run)
    builds = [] if arguments.dry_run else [_build(what, environment) for what in BUILDS.values()]
    files, failed = [], []
    for stage in STAGES:
        left = arguments.budget_s - (time.monotonic() - started)
        is_arms = stage.letter == "e"
        if stage.letter not in arguments.stages.split(",") or (is_arms and not (arguments.arms or arguments.dry_run)):
            continue
        if left < LEAST_S:
            print(f"{stage.letter}: not run, {left:.0f} s are left", flush=True)
            continue
        file = arguments.out / f"{stage.script}.jsonl"
        if not is_arms:
            file.unlink(missing_ok=True)
        more = ["--arms", str(arguments.arms.resolve())] if is_arms and arguments.arms else []
        limit = min(stage.limit_s * (5 if arguments.dry_run else 1), left)
        if not run_stage(stage, file, limit, arguments.dry_run, environment, more):
            failed.append(stage.letter)
        files += [file] if file.is_file() else []
    for build in builds:
        build.kill()
    found = [record for file in files for record in records.read(file)]
    failed += [record.settings["stage"] for record in found if record.name == "failed"]
    print("\n".join(tables(found)))
    print(f"{time.monotonic() - started:.0f} s; stages with failures: {', '.join(sorted(set(failed))) or 'none'}")
    return 1 if failed and arguments.dry_run else 0


def _environment(commit: str, dry_run: bool) -> dict[str, str]:
    """What stages inherit: our kernels and DeepSpeed's compiled for this card alone, nothing that waits for a network."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
        "LISA_DS_COMMIT": commit,
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if dry_run:
        return os.environ | common | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capability = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    return os.environ | common | {"TORCH_CUDA_ARCH_LIST": capability, "DS_BUILD_OPS": "0"}


def _build(code: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Compiles while the first stages run; who needs it before it is done waits for it."""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def run_stage(
    stage: Stage, file: Path, limit: float, dry_run: bool, environment: dict[str, str], more: Sequence[str] = ()
) -> bool:
    """Whether the stage ended by itself, and well. It gets to know its limit, and a little more than that to end."""
    print(f"---- {stage.letter}: {stage.script}, {limit:.0f} s at most", flush=True)
    script = ROOT / "benchmarks" / f"{stage.script}.py"
    command = [sys.executable, str(script), "--out", str(file), "--limit-s", f"{limit - 5:.0f}", *more]
    start = time.monotonic()
    process = subprocess.Popen(command + ["--dry-run"] * dry_run, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it has left running
    process.wait()
    how = "was ended at its limit" if code is None else f"ended with exit code {code}"
    print(f"---- {stage.letter}: {how} after {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def tables(found: list[records.Record]) -> list[str]:
    devices = sorted({record.device for record in found})
    claims = [claim for stage in STAGES for claim in stage.claims]
    failures = [
        f"failed: {r.settings['stage']}, {r.variant}: {r.settings['error']}" for r in found if r.name == "failed"
    ]
    lines = [f"Measured on: {', '.join(devices) or 'nothing'}", "", *table(claims, found), "", *failures]
    for stage in (gpu_models, gpu_kernels, gpu_arms):
        if rows := stage.table(found):
            lines += ["", *rows]
    return lines


if __name__ == "__main__":
    sys.exit(main())
