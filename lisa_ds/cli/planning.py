"""The command `plan`: the memory a run takes on each rank, before it starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from lisa_ds.cli import values
from lisa_ds.config import load_config, model_alone
from lisa_ds.errors import ConfigError

NOT_FITTING = 2
"""Exit code of `plan` for a run that does not fit into the device's memory, for batch scripts to test."""


def add(commands: values.Commands) -> None:
    """Declare `plan`."""
    plan = commands.add_parser("plan", help="tell what a run will take on each rank, from its config alone")
    values.add_run(plan)
    plan.add_argument("--model", metavar="NAME", help="a directory, a config.json, a built-in or hub name")
    plan.add_argument("--world-size", type=values.count, default=1, metavar="N", help="ranks in all; default: 1")
    plan.add_argument("--gpu-memory", type=values.memory, metavar="SIZE", help="of a device, such as 80GB (of 2^30)")
    plan.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    plan.add_argument("--figure", type=Path, metavar="FILE", help="draw it as well: .png, .svg or .pdf")
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from lisa_ds.memory import settings
    from lisa_ds.report import plan

    file, overrides = values.run_file(arguments)
    if file is None and arguments.model is None:
        raise ConfigError("plan: name the FILE of a run, or --model NAME for a model alone")
    if file is not None:
        overrides += [f"model.name_or_path={arguments.model}"] if arguments.model else []
        config = load_config(file, overrides)
    else:
        config = model_alone(arguments.model, overrides)
    architecture = settings.architecture_of(config.model)
    name, run = config.model.name_or_path, settings.from_run(config, architecture, num_ranks=arguments.world_size)
    report = plan.make(name, architecture, run, arguments.gpu_memory)
    print(json.dumps(plan.as_json(report), indent=2) if arguments.json else "\n".join(plan.lines(report)))
    if arguments.figure:
        plan.figure(report, arguments.figure)
    return NOT_FITTING if report.fits is False else 0
