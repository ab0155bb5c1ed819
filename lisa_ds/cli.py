"""``lisa-ds``: what is done with checkpoints, models and kernels outside of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import lisa_ds
from lisa_ds.config import ModelConfig
from lisa_ds.errors import ConfigError, LisaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 after an error that is the user's to put right; its message is on stderr.
    """
    try:
        arguments = _parse(argv)
        arguments.command(arguments)
    except LisaError as error:
        print(f"lisa-ds: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _export(arguments: argparse.Namespace) -> None:
    # Imported when needed: `lisa-ds --version` on a login node loads neither torch nor DeepSpeed.
    from lisa_ds.checkpoint import export
    from lisa_ds.engines.zero3.fragments import read_weights

    export(arguments.checkpoint, arguments.out, read_weights, model=arguments.model, dtype=arguments.dtype)
    print(f"wrote {arguments.out}")


def _ops(arguments: argparse.Namespace) -> None:
    from lisa_ds.ops import report

    print("\n".join(report.lines(build=arguments.build)))


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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number, 1 or more, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="lisa-ds", description="LISA fine-tuning under DeepSpeed ZeRO-3.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lisa-ds {lisa_ds.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    export = commands.add_parser("export", help="turn a training checkpoint into a Hugging Face model directory")
    export.add_argument("checkpoint", type=Path, help="such as runs/demo/checkpoint-40; read only those you trust")
    export.add_argument("out", type=Path, help="a new directory")
    export.add_argument("--model", help="whose config and tokenizer to use if the checkpoint holds none")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the config's")
    export.set_defaults(command=_export)

    ops = commands.add_parser("ops", help="print which kernels can be used here, which not, and why")
    ops.add_argument("--build", action="store_true", help="compile those that are not compiled yet, as at first use")
    ops.set_defaults(command=_ops)

    generate = commands.add_parser("generate", help="let a model answer prompts")
    generate.add_argument("model", help="a directory, a hub name or builtin:smollm2-135m")
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("--max_new_tokens", type=_count, default=128, metavar="N")
    generate.set_defaults(command=_generate)
    return parser.parse_args(argv)
