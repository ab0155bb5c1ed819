"""``lisa-ds``: what is done with checkpoints, models and kernels outside of a run."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import lisa_ds
from lisa_ds.cluster import environment
from lisa_ds.config import ModelConfig, load_config
from lisa_ds.errors import ConfigError, LisaError

SCORES = ("accumulated", "mean", "empirical", "hutchinson", "weight_norm")
"""What `profile` measures: norms of gradients in two ways, the curvature of the loss in two, and norms of weights."""

NOT_FITTING = 2
"""Exit code of `plan` for a run that does not fit: a batch script can ask before it starts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 after an error that is the user's to put right; its message is on stderr.
    """
    try:
        arguments = _parse(argv)
        code: int | None = arguments.command(arguments)
    except LisaError as error:
        print(f"lisa-ds: error: {error}", file=sys.stderr)
        return error.exit_code
    return code or 0


def _check(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.lisa_config, arguments.overrides) if arguments.lisa_config else None
    if arguments.overrides and not config:
        raise ConfigError(f"command line: {arguments.overrides[0]!r} is a key of a run: give its file, --lisa_config")
    environment.fill()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what torch would log, with stacks, is told in words
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a collective that hangs is to raise, not to abort

    from lisa_ds.cluster import check, deadline, hosts, paths

    options = check.Options(paths.targets(config), arguments.timeout, arguments.hostfile, arguments.json)
    try:
        return deadline.leave(check.check(hosts.place(os.environ), os.environ, options))
    except LisaError as error:
        print(f"lisa-ds: error: {error}", file=sys.stderr)
        return deadline.leave(error.exit_code)


def _export(arguments: argparse.Namespace) -> None:
    # Imported when needed: `lisa-ds --version` on a login node loads neither torch nor DeepSpeed.
    from lisa_ds.checkpoint import export
    from lisa_ds.engines.zero3.fragments import read_weights

    export(arguments.checkpoint, arguments.out, read_weights, model=arguments.model, dtype=arguments.dtype)
    print(f"wrote {arguments.out}")


def _ops(arguments: argparse.Namespace) -> None:
    from lisa_ds.ops import report

    print("\n".join(report.lines(build=arguments.build)))


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from lisa_ds.memory import settings
    from lisa_ds.report import plan

    if arguments.lisa_config is None and arguments.model is None:
        raise ConfigError("plan: say --lisa_config FILE for a run, or --model NAME for a model alone")
    if arguments.lisa_config is not None:
        overrides = [*arguments.overrides, *([f"model.name_or_path={arguments.model}"] if arguments.model else [])]
        config = load_config(arguments.lisa_config, overrides)
        architecture = settings.architecture_of(config.model)
        name, run = config.model.name_or_path, settings.from_run(config, architecture, num_ranks=arguments.world_size)
    elif arguments.overrides:
        raise ConfigError(f"plan: {arguments.overrides[0]!r} overrides a run's file; say --lisa_config")
    else:
        name = arguments.model
        architecture, run = settings.of_model(ModelConfig(name_or_path=name), num_ranks=arguments.world_size)
    report = plan.make(name, architecture, run, arguments.gpu_memory)
    print(json.dumps(plan.as_json(report), indent=2) if arguments.json else "\n".join(plan.lines(report)))
    if arguments.figure:
        plan.figure(report, arguments.figure)
    return NOT_FITTING if report.fits is False else 0


def _profile(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.lisa_config, arguments.overrides)
    environment.fill()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if os.environ["RANK"] == "0":
        logging.getLogger("lisa_ds.scores").setLevel(logging.INFO)  # how far it is

    from lisa_ds.train.profile import profile

    profile(config, out=arguments.out, score=arguments.score)


def _report_layers(arguments: argparse.Namespace) -> None:
    from lisa_ds.report import layers

    histories = layers.load(arguments.runs)
    print("\n".join(layers.lines(histories)))
    if arguments.out is not None:
        print("", *(f"wrote {path}" for path in layers.draw(histories, arguments.out, arguments.format)), sep="\n")


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


def _memory(text: str) -> int:
    number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if number is None or not float(number[1]):
        raise argparse.ArgumentTypeError(f"should be such as 80GB, got {text!r}")
    return int(float(number[1]) * 2**30)  # as devices are sold


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number, 1 or more, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"should be seconds, more than 0 and at most 3600, got {text!r}")
    return seconds


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="lisa-ds", description="LISA fine-tuning under DeepSpeed ZeRO-3.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lisa-ds {lisa_ds.__version__}")
    # `deepspeed --no_python lisa-ds check` puts it here.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="see, before a run, whether its hosts fit together; on every rank")
    check.add_argument("--lisa_config", type=Path, metavar="FILE", help="the run whose paths are checked, too")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="as for the run")
    check.add_argument("--timeout", type=_seconds, default=20.0, metavar="S", help="seconds a step may wait: 20")
    check.add_argument("--hostfile", type=Path, metavar="FILE", help="names hosts whose ranks do not arrive")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(command=_check)

    export = commands.add_parser("export", help="turn a training checkpoint into a Hugging Face model directory")
    export.add_argument("checkpoint", type=Path, help="such as runs/demo/checkpoint-40; read only those you trust")
    export.add_argument("out", type=Path, help="a new directory")
    export.add_argument("--model", help="whose config and tokenizer to use if the checkpoint holds none")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the config's")
    export.set_defaults(command=_export)

    ops = commands.add_parser("ops", help="print which kernels can be used here, which not, and why")
    ops.add_argument("--build", action="store_true", help="compile those that are not compiled yet, as at first use")
    ops.set_defaults(command=_ops)

    plan = commands.add_parser("plan", help="tell what a run will take on each rank, from its config alone")
    plan.add_argument("--lisa_config", metavar="FILE", help="the run: a YAML or JSON file")
    plan.add_argument("--model", metavar="NAME", help="a directory, a config.json, a built-in or hub name")
    plan.add_argument("--world-size", type=_count, default=1, metavar="N", help="ranks in all; default: 1")
    plan.add_argument("--gpu-memory", type=_memory, metavar="SIZE", help="of one device, such as 80GB (of 2^30 bytes)")
    plan.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    plan.add_argument("--figure", type=Path, metavar="FILE", help="draw it as well: .png, .svg or .pdf")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.bf16=true")
    plan.set_defaults(command=_plan)

    profile = commands.add_parser(
        "profile", help="score all layers of a run's model on its data, into a file for a sampler"
    )
    profile.add_argument("--lisa_config", required=True, metavar="FILE", help="the run: a YAML or JSON file")
    profile.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new file, such as scores.json")
    profile.add_argument("--score", choices=SCORES, help="default: what the run's sampler measures, else accumulated")
    profile.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as lisa.sampler.calibration_batches=16"
    )
    profile.set_defaults(command=_profile)

    report = commands.add_parser("report", help="draw what runs have recorded")
    reports = report.add_subparsers(required=True, metavar="WHAT")
    layers = reports.add_parser(
        "layers", help="norms of weights, gradients and updates by layer, visits, probabilities"
    )
    layers.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's output directory, or its layers.jsonl"
    )
    layers.add_argument(
        "--out", type=Path, metavar="DIR", help="draw figures into it; without it, print the table alone"
    )
    layers.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures; default: png")
    layers.set_defaults(command=_report_layers)

    generate = commands.add_parser("generate", help="let a model answer prompts")
    generate.add_argument("model", help="a directory, a hub name or builtin:smollm2-135m")
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("--max_new_tokens", type=_count, default=128, metavar="N")
    generate.set_defaults(command=_generate)
    return parser.parse_args(argv)


if __name__ == "__main__":  # `deepspeed --module lisa_ds.cli check`
    sys.exit(main())
