"""Tasks of lm-evaluation-harness: our own on local files, and those it comes with, whose data is on the Hugging Face hub."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import set_seed

from lisa_ds.errors import ConfigError, DataError, LisaError

_TASKS = Path(__file__).parent / "tasks"
_SEED = 1234  # as the harness has it


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of a task, or of a group of tasks."""

    task: str
    metric: str
    filter: str
    """Which part of an answer was scored; ``none`` for all of it."""

    value: float
    stderr: float | None
    """Standard error of the mean over rows; None where the harness has none."""

    n: int
    """Rows."""

    num_fewshot: int | None
    version: str
    """Of the task."""


def local_tasks() -> tuple[str, ...]:
    """Our own tasks, which need no hub."""
    return tuple(sorted(path.stem for path in _TASKS.glob("*.yaml")))


def check(names: Sequence[str], data_dir: str | None) -> None:
    """Refuse what can be refused without the harness, which takes seconds to load.

    Raises:
        ConfigError: No task is named, the harness is not installed, or a local task has no data.
    """
    if not names:
        raise ConfigError(f"--tasks: should be names with commas between, such as {','.join(local_tasks())}")
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks: needs lm_eval, which is not installed; pip install 'lisa-ds[evaluate]'")
    local = [name for name in names if name in local_tasks()]
    if local and data_dir is None:
        raise ConfigError(f"--tasks: {local[0]} reads local files; say where they are, --data-dir DIR")
    if data_dir is not None and not local:
        raise ConfigError(f"--data-dir: is read by {' and '.join(local_tasks())} alone, got {','.join(names)}")
    if data_dir is not None and not os.path.isdir(os.path.expanduser(data_dir)):
        raise ConfigError(f"--data-dir: no such directory, got {data_dir!r} (looked from {Path.cwd()})")


def load(names: Sequence[str], data_dir: str | None, num_fewshot: int | None) -> Any:
    """The tasks with their data, for :func:`run`.

    Args:
        names: Of our own tasks, or of the harness's tasks, groups and tags.
        data_dir: Where ours find their files.
        num_fewshot: Worked examples before each question; None for the task's own number.

    Raises:
        ConfigError: There is no such task, or it cannot be run here.
        DataError: Its data cannot be had.
    """
    # It warns of its own defaults, of which a user of ours has no choice.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry, for a hub that cannot be reached
    from lm_eval.tasks import TaskManager

    others = [name for name in names if name not in local_tasks()]
    manager = TaskManager(
        include_path=str(_TASKS),
        include_defaults=bool(others),  # thousands of files, which take seconds to list
        metadata={"data_dir": data_dir or "", "num_examples": num_fewshot},  # of which tasks of its own know nothing
    )
    if unknown := [name for name in others if name not in manager.all_tasks]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise ConfigError(
            f"--tasks: there is no task {unknown[0]!r} in lm_eval; "
            + (f"did you mean {' or '.join(near)}?" if near else f"offline there are {' and '.join(local_tasks())}")
        )
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            loaded = manager.load([name])
        except LisaError:
            raise
        except Exception as error:  # whatever the hub, the network or a task's own code says
            raise DataError(
                f"--tasks: the data of {name} is on the Hugging Face hub and could not be loaded: {_first_line(error)}; offline there "
                f"are {' and '.join(local_tasks())}"
            ) from error
        for kind, known in found.items():
            known.update(loaded[kind])
    for name, task in found["tasks"].items():
        _prepare(name, task, num_fewshot)
    return found


def _prepare(name: str, task: Any, num_fewshot: int | None) -> None:
    """Refuse a task that is not for a model of text, or runs code; set how many examples it gives, and which."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"--tasks: {name} executes code that the model writes, which is not done here; use lm_eval itself"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"--tasks: {name} is for models that see or hear; choose one of texts alone")
    own = task.get_config("num_fewshot")
    if num_fewshot and own == 0:
        raise ConfigError(f"--num-fewshot: {name} is asked without examples by its definition, got {num_fewshot}")
    task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
    task.set_fewshot_seed(seed=_SEED)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def run(
    model: Any,
    tokenizer: Any,
    loaded: Any,
    *,
    batch_size: int,
    limit: int | None,
    apply_chat_template: bool,
) -> list[Score]:
    """Score a model.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        loaded: Of :func:`load`.
        batch_size: Rows at once.
        limit: At most so many rows of each task.
        apply_chat_template: Whether prompts go through the tokenizer's chat template, each example as turns of its own.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    set_seed(_SEED)  # of tasks that draw tokens
    results = evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        task_dict=loaded,
        limit=limit,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
        log_samples=False,
    )
    assert results is not None  # of another rank than the first
    return list(_scores(results))


def _scores(results: Any) -> Iterator[Score]:
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            yield Score(
                task=task,
                metric=metric,
                filter=chosen,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
                n=metrics["sample_len"],
                num_fewshot=results["n-shot"].get(task),
                version=str(results["versions"].get(task, "")),
            )
