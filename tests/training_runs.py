"""A small run from a file: written, and trained on CPU ranks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests import programs, tiny

TRACKER = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"


def launch(folder: Path, *more: str, ranks: int = 2, really: bool = False) -> subprocess.CompletedProcess[str]:
    """``deepspeed --num_gpus RANKS launch/train.py``; with 0 ranks, ``python launch/train.py``.

    Only ``really`` by the launcher: it and its ranks import for seconds what forked ranks have at once.
    """
    environment = {**programs.variables(folder), "LISA_DS_PEAK_TFLOPS": "0.01"}  # no CPU is in the table
    script = [str(programs.ROOT / "launch/train.py"), "--lisa_config", "run.yaml", *more]
    if not really:
        return programs.on_ranks(ranks, script, folder, environment)
    command = [*(programs.deepspeed(ranks) if ranks else [sys.executable]), *script]
    return programs.run(command, folder, environment)


def write_run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.alpaca)
    run = {
        "model": {"name_or_path": "model"},
        "data": {"path": "rows.jsonl", "eval_fraction": 0.25, "max_length": 64},
        "lisa": {"num_sampled_layers": 1, "interval_steps": 2},
        "training": {
            **{"output_dir": "out", "max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": TRACKER},
            **{"bf16": True, "gradient_checkpointing": True, "lr_scheduler_type": "constant"},
        },
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder
