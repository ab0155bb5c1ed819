"""What every test relies on: one thread, the CPU where there is no GPU, and nothing that phones home."""

from __future__ import annotations

import os

# Before torch is imported: OpenMP reads its thread count once, and several ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out by itself, with a warning


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not by keywords, of which the checkout's own folders are some
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
