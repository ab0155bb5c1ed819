"""The command `evaluate`: held-out loss, tasks, answers for a judge, and samples of an exported model or adapter."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from lisa_ds.cli import values
from lisa_ds.errors import ConfigError
from lisa_ds.run_log import SAMPLES

# Options that go with one thing that can be measured, and with no other.
_ONLY = {
    "data_dir": ("tasks",),
    "limit": ("tasks",),
    "num_fewshot": ("tasks",),
    "apply_chat_template": ("tasks",),
    "model_id": ("answers",),
    "max_new_tokens": ("answers", "samples"),
}


def add(commands: values.Commands) -> None:
    """Declare `evaluate`."""
    evaluate = commands.add_parser("evaluate", help="measure a model or adapter: held-out loss, tasks, answers")
    evaluate.add_argument(
        "model",
        metavar="MODEL",
        help="a run's output directory, a model's or an adapter's, a hub name, or builtin:NAME",
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.eval_path=test.jsonl")
    evaluate.add_argument(
        "--lisa_config", metavar="FILE", help="the run whose data it is; default: the model's own run"
    )
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="append records to it; of --answers, the answers")
    evaluate.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the weights are stored in")
    evaluate.add_argument("--batch-size", type=values.count, metavar="N", help="rows at once; default: 8")
    what = evaluate.add_argument_group(
        "what to measure", "without any of these, the loss per token of the held-out rows"
    ).add_mutually_exclusive_group()
    what.add_argument("--tasks", metavar="NAME,...", help="of lm-evaluation-harness: mmlu, gsm8k_cot_local, ...")
    what.add_argument("--answers", type=Path, metavar="FILE", help="answer a jsonl of questions, for a judge")
    what.add_argument("--samples", type=Path, metavar="FILE", help="answer prompts before and after training")
    more = evaluate.add_argument_group("of tasks")
    more.add_argument("--data-dir", metavar="DIR", help="files of gsm8k_cot_local and pubmedqa_5shot")
    more.add_argument("--limit", type=values.count, metavar="N", help="the most rows of each task")
    more.add_argument(
        "--num-fewshot", type=_number, metavar="N", help="worked examples; default: the task's own number"
    )
    more.add_argument("--apply-chat-template", action="store_true", help="put prompts through the chat template")
    texts = evaluate.add_argument_group("of answers and samples")
    texts.add_argument(
        "--model-id", metavar="NAME", help="what the judge calls the model; default: its directory's name"
    )
    texts.add_argument(
        "--max-new-tokens", type=values.count, metavar="N", help="default: 1024 a turn for answers, 128 for samples"
    )
    evaluate.set_defaults(command=_evaluate)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be a whole number, 0 or more, got {text!r}")
    return int(text)


def _evaluate(arguments: argparse.Namespace) -> None:
    what = next((name for name in ("tasks", "answers", "samples") if getattr(arguments, name) is not None), "loss")
    for option, kinds in _ONLY.items():
        if getattr(arguments, option) not in (None, False) and what not in kinds:
            goes_with = " and ".join(f"--{kind}" for kind in kinds)
            raise ConfigError(f"--{option.replace('_', '-')}: goes with {goes_with}")
    if what in ("answers", "samples") and arguments.batch_size is not None:
        raise ConfigError(f"--batch-size: --{what} asks one thing at a time; leave it out")
    if what == "answers" and arguments.out is None:
        raise ConfigError("--answers: say where the answers go, --out FILE.jsonl")
    if what == "samples" and arguments.out is not None:
        raise ConfigError(f"--samples: writes {SAMPLES} into the run's directory; leave --out out")
    if what != "loss" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"--{what}: runs in one process; only the held-out loss is shared out among ranks")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)

    from lisa_ds.evaluate import command

    getattr(command, what)(arguments)
