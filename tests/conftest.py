"""What every test relies on: one thread, the CPU where there is no GPU, and nothing that phones home."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

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

BUDGET_S = 60
"""Seconds that the tests of one file may take in one run, set-up included; those that take more are named at the end."""


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.xdist_group(_group(item)))
    # Not by keywords, of which the checkout's own folders are some.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command that ran in this process has set up how its messages are shown; the next test looks for them elsewhere."""
    logger = logging.getLogger("lisa_ds")
    level = logger.level
    yield
    logger.setLevel(level)


def _group(item: pytest.Item) -> str:
    """Where tests run side by side, those of a file run in one process; if it says so, those of each case apart from others.

    So tests that share a run of ranks share a process with it.
    """
    marker = item.get_closest_marker("by_case")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case = parameters.get(marker.args[0], "") if marker else ""
    return f"{item.path.parent.name}/{item.path.stem}:{getattr(case, 'name', case)}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The files that took longest, and which of them are over their budget."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"seconds by file (budget: {BUDGET_S})")
    for file, total in seconds.most_common():
        if total >= BUDGET_S / 4:
            terminalreporter.write_line(f"{total:7.1f}  {file}{'  OVER BUDGET' if total > BUDGET_S else ''}")
