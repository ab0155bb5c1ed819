"""The commands `export`, `merge`, `unmerge` and `generate`: write a trained model for other programs, and prompt it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lisa_ds.cli import values

DTYPES = ("float32", "bfloat16", "float16")


def add(commands: values.Commands) -> None:
    """Declare the commands."""
    export = commands.add_parser("export", help="turn a checkpoint into a Hugging Face model directory")
    export.add_argument("checkpoint", type=Path, help="a run's output_dir/checkpoint-N; read only those you trust")
    export.add_argument("out", type=Path, help="a new directory")
    export.add_argument("--model", help="whose config and tokenizer to use if the checkpoint holds none")
    export.add_argument("--dtype", choices=DTYPES, help="default: the config's")
    export.add_argument("--merged", action="store_true", help="of a PEFT checkpoint: its model, not the adapter alone")
    export.set_defaults(command=_export)

    merge = commands.add_parser("merge", help="add a LoRA adapter to its base model, in files")
    merge.add_argument(
        "adapter", type=Path, help="a directory with adapter_config.json, such as a run's output_dir/model"
    )
    merge.add_argument("--out", type=Path, required=True, help="a new directory")
    merge.add_argument(
        "--base", help="a directory, a hub name or builtin:smollm2-135m; default: what the adapter names"
    )
    merge.add_argument("--dtype", choices=DTYPES, help="default: each weight keeps the base's")
    merge.set_defaults(command=_merge)

    unmerge = commands.add_parser("unmerge", help="give the base of a merged model back, bit for bit")
    unmerge.add_argument("merged", type=Path, help="a directory that `lisa-ds merge` wrote")
    unmerge.add_argument("--out", type=Path, required=True, help="a new directory")
    unmerge.add_argument("--base", help="where the base model is now; default: where it was when it was merged")
    unmerge.set_defaults(command=_unmerge)

    generate = commands.add_parser("generate", help="let a model answer prompts")
    generate.add_argument("model", help="a run's output_dir, a model or an adapter, a hub name or builtin:smollm2-135m")
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("--max_new_tokens", type=values.count, default=128, metavar="N", help="default: 128")
    generate.set_defaults(command=_generate)


def _export(arguments: argparse.Namespace) -> None:
    from lisa_ds.checkpoint import export
    from lisa_ds.engines.zero3.checkpoint.consolidate import read_weights

    export(
        arguments.checkpoint,
        arguments.out,
        read_weights,
        model=arguments.model,
        dtype=arguments.dtype,
        merged=arguments.merged,
    )
    print(f"wrote {arguments.out}")


def _merge(arguments: argparse.Namespace) -> None:
    from lisa_ds.checkpoint import merge

    count = merge(arguments.adapter, arguments.out, base=arguments.base, dtype=arguments.dtype)
    print(f"wrote {arguments.out}: {count} weights changed")


def _unmerge(arguments: argparse.Namespace) -> None:
    from lisa_ds.checkpoint import unmerge

    unmerge(arguments.merged, arguments.out, base=arguments.base)
    print(f"wrote {arguments.out}: the base model, bit for bit")


def _generate(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging

    from lisa_ds.evaluate.opened import open_subject
    from lisa_ds.evaluate.subject import find, settings
    from lisa_ds.models import answer

    logging.disable_progress_bar()
    subject = find(arguments.model)
    opened = open_subject(subject, settings(subject, None, ()), any_text=True)
    model = opened.load(None)
    for prompt in arguments.prompt:
        print(answer(model, opened.tokenizer, prompt, max_new_tokens=arguments.max_new_tokens))
