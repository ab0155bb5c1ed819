"""Fine-tune a small language model by LISA on all GPUs, or on two CPU ranks, and ask it something."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from lisa_ds.cluster.environment import free_port

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("runs/demo")
PROMPT = "What does `shutil.copyfile(src, dst)` do in Python?"


def main() -> int:
    num_gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    command += ["--num_gpus", str(num_gpus or 2), "--master_port", str(free_port())]
    command += ["launch/train.py", "--lisa_config", "configs/demo.yaml", f"training.output_dir={OUTPUT}"]
    if not fast_in_bf16():
        command.append("training.bf16=false")
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    print("$", " ".join(command), flush=True)
    if not num_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out by itself, with many warnings
    start = time.perf_counter()
    if code := subprocess.run(command, cwd=ROOT).returncode:
        return code
    print(f"the run took {time.perf_counter() - start:.0f} s")

    from lisa_ds.config import ModelConfig
    from lisa_ds.models import answer, load_model, load_tokenizer

    trained = ModelConfig(name_or_path=str(ROOT / OUTPUT / "model"))
    print(f"\n{PROMPT}\n> {answer(load_model(trained), load_tokenizer(trained), PROMPT)}")
    return 0


def fast_in_bf16() -> bool:
    """Whether the hardware multiplies bf16 itself; a CPU that has to emulate it is faster in fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


if __name__ == "__main__":
    sys.exit(main())
