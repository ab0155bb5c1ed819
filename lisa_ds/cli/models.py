"""The commands `export` and `generate`: write a trained model for other programs, and prompt it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lisa_ds.cli import values
from lisa_ds.config import ModelConfig


def add(commands: values.Commands) -> None:
    """Declare `export` and `generate`."""
    export = commands.add_parser("export", help="turn a checkpoint into a Hugging Face model directory")
    export.add_argument("checkpoint", type=Path, help="a run's output_dir/checkpoint-N; read only those you trust")
    export.add_argument("out", type=Path, help="a new directory")
    export.add_argument("--model", help="whose config and tokenizer to use if the checkpoint holds none")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the config's")
    export.add_argument("--merged", action="store_true", help="of a PEFT checkpoint: its model, not the adapter alone")
    export.set_defaults(command=_export)

    generate = commands.add_parser("generate", help="let a model answer prompts")
    generate.add_argument("model", help="a directory, a hub name or builtin:smollm2-135m")
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


def _generate(arguments: argparse.Namespace) -> None:
    import torch
    from transformers.utils import logging

    from lisa_ds.models import answer, load_model, load_tokenizer

    logging.disable_progress_bar()
    config = ModelConfig(name_or_path=arguments.model)
    tokenizer = load_tokenizer(config)
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu")
    for prompt in arguments.prompt:
        print(answer(model, tokenizer, prompt, max_new_tokens=arguments.max_new_tokens))
