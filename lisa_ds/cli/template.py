"""The run file that `lisa-ds init` writes: a reason beside each key, and settings that fit the given GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lisa_ds.config import ModelConfig, RunConfig
from lisa_ds.config.files import parse_yaml
from lisa_ds.errors import ConfigError, LisaError
from lisa_ds.memory import advice, catalogue, settings
from lisa_ds.memory.architectures import Architecture

SMALL = 1_000_000_000
"""A model with fewer parameters than this gets a larger learning rate."""

_COMMENTS = {
    "model.name_or_path": "a directory, or a name on the Hugging Face hub",
    "data.path": "json, jsonl, parquet, csv, tsv or txt, a directory of them, or a name on the hub",
    "data.eval_split": "held out: its loss is told before and after",
    "data.eval_fraction": "share of the rows that is held out: its loss is told before and after",
    "data.eval_max_rows": "evaluate on so many rows at most",
    "data.max_length": "tokens of a row at most",
    "method": "lisa | full | lora | galore: the same run by another method",
    "lora.rank": "of the adapters: a higher one trains and takes more",
    "galore.rank": "of the gradients' projection",
    "lisa.num_sampled_layers": "blocks that train at a time: more take more memory",
    "lisa.interval_steps": "optimizer steps until others are drawn",
    "lisa.embeddings_lr_scale": "the embeddings, which always train, at a tenth of the learning rate",
    "lisa.embeddings": "do not train, to save memory",
    "lisa.lm_head": "does not train, to save memory",
    "lisa.optimizer": "kept smaller, to save memory: docs/kernels.md says what it costs",
    "training.learning_rate": "the first thing to try others of: three times more, or less",
    "training.warmup_steps": "share of the run in which it rises",
    "training.gradient_accumulation_steps": "rows of a step: this x the batch size x the ranks",
    "training.gradient_checkpointing": "less memory, a third more computing",
    "training.bf16": "false for GPUs that have none (before Ampere), and most CPUs",
    "training.save_steps": "a checkpoint every so many steps, from which --resume auto goes on",
    "training.save_total_limit": "only the last checkpoints are kept",
    "deepspeed": "less memory, more work: see `lisa-ds plan`",
}


@dataclass(frozen=True)
class Template:
    """The keys of a run file, and notes for the user: what was changed to fit the GPUs."""

    fields: dict[str, Any]
    notes: list[str]


def memory_of_device() -> int:
    """Memory of this machine's first GPU, in bytes."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def make(model: str, data: str, method: str, gpus: int, memory: int | None) -> Template:
    """A run of ``model`` on ``data``.

    Args:
        model: As in ``model.name_or_path``.
        data: As in ``data.path``.
        method: ``lisa``, ``full``, ``lora`` or ``galore``.
        gpus: How many there are; 0 for a run on the CPU.
        memory: Bytes of each; None if unknown, and then nothing is planned.

    Raises:
        LisaError: There is no such model, or it does not fit, whatever is changed.
    """
    notes = []
    architecture = None
    local = model.startswith(("builtin:", ".", "/", "~")) or Path(model).expanduser().exists()
    if local or memory or catalogue.find(model) is not None:  # else the hub would be asked
        try:
            architecture = settings.architecture_of(ModelConfig(name_or_path=model))
        except LisaError as error:
            if local:
                raise ConfigError(f"--model: {error}") from None
            notes.append(f"not planned: {error}")
    if (data.startswith((".", "/", "~")) or Path(data).suffix) and not Path(data).expanduser().exists():
        notes.append(f"{data}: is not there yet")
    fields = _fields(model, data, method, gpus, architecture.num_parameters if architecture else 0)
    if architecture and memory and gpus:
        for change in _changes(fields, architecture, gpus, memory):
            for word in change.write.split(" "):
                key, _, value = word.partition("=")
                _put(fields, key.split("."), parse_yaml(value))
            notes.append(f"to fit {memory / 2**30:g} GB: {change.write} ({change.costs})")
        if fields.get("lisa", {}).get("embeddings") == "never":
            del fields["lisa"]["embeddings_lr_scale"]
    return Template(fields, notes)


def text(run: Template) -> str:
    """The text of the run file."""
    head = [
        "# A run for `lisa-ds train`. docs/config.md has every key; the command line overrides any: training.max_steps=20",
        "# output_dir is runs/ and the name of this file, unless training.output_dir says otherwise.",
    ]
    return "\n".join([*head, *_lines(run.fields)]) + "\n"


def _fields(model: str, data: str, method: str, gpus: int, parameters: int) -> dict[str, Any]:
    held_out: dict[str, Any] = {"eval_fraction": 0.05}
    if data == "builtin:stdlib-docs":
        held_out = {"eval_split": "test"}
    sections: dict[str, dict[str, Any]] = {
        "lisa": {"num_sampled_layers": 2, "interval_steps": 20, "embeddings_lr_scale": 0.1},
        "lora": {"rank": 16},
        "galore": {"rank": 256},
    }
    return {
        "model": {"name_or_path": model},
        "data": {"path": data, **held_out, "eval_max_rows": 200, "max_length": 1024 if gpus else 256},
        "method": method,
        **({method: sections[method]} if method in sections else {}),
        "training": {
            "learning_rate": (1e-4 if 0 < parameters < SMALL else 1e-5) * (10 if method == "lora" else 1),
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": max(1, 16 // (gpus or 1)),
            "bf16": gpus > 0,
            "logging_steps": 10,
            "save_steps": 200,
            "save_total_limit": 2,
        },
    }


def _changes(fields: dict[str, Any], architecture: Architecture, gpus: int, memory: int) -> list[advice.Change]:
    config = RunConfig.model_validate(fields)
    run = settings.from_run(config, architecture, num_ranks=gpus)
    changes = advice.changes(architecture, run, memory)
    if changes and changes[-1].peak > advice.usable(memory):
        fewest = advice.fewest_ranks(architecture, run, memory)
        ranks = f"; without changes it takes {fewest} of them" if fewest else ""
        raise ConfigError(
            f"--gpus: {config.model.name_or_path} takes {changes[-1].peak / 1e9:.1f} GB on each of {gpus} GPUs, whatever is "
            f"changed, and they have {memory / 1e9:.1f} GB{ranks}"
        )
    return changes


def _put(fields: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, key = path
    for section in sections:
        fields = fields.setdefault(section, {})
    fields[key] = value


def _lines(fields: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    indent = "  " * len(path)
    plain = {key: f"{key}: {_scalar(value)}" for key, value in fields.items() if not isinstance(value, dict)}
    width = max(map(len, plain.values()), default=0)
    for key, value in fields.items():
        comment = _COMMENTS.get(".".join((*path, key)))
        if not path:
            yield ""
        line = plain.get(key, f"{key}:")
        yield indent + (f"{line:{width if path else 0}}  # {comment}" if comment else line)
        if isinstance(value, dict):
            yield from _lines(value, (*path, key))


def _scalar(value: Any) -> str:
    """A value as YAML on one line, quoted where it has to be."""
    written: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    written = written.removesuffix("\n").removesuffix("\n...")
    return written if parse_yaml(written) == value else json.dumps(value)  # 1e-3 is a number here, and not to PyYAML
