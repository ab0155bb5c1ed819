"""The commands `profile` and `report layers`: score a model's layers before a run, show their statistics after it."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from lisa_ds.cli import values
from lisa_ds.cluster import environment
from lisa_ds.config import load_config
from lisa_ds.config.sampler_kinds import MEASURES
from lisa_ds.errors import ConfigError


def add(commands: values.Commands) -> None:
    """Declare `profile` and `report layers`."""
    profile = commands.add_parser("profile", help="score the layers of a run's model, for a sampler")
    values.add_run(profile)
    profile.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new file, such as scores.json")
    profile.add_argument(
        "--score",
        choices=tuple(MEASURES),
        metavar="KIND",
        help=f"{', '.join(MEASURES)}; default: what the run's sampler measures, else the first",
    )
    profile.set_defaults(command=_profile)

    report = commands.add_parser("report", help="draw what runs have recorded")
    report.set_defaults(command=lambda _: report.print_help())
    reports = report.add_subparsers(title="what", metavar="WHAT")
    layers = reports.add_parser("layers", help="norms of weights, gradients, updates; visits, probabilities")
    layers.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an output directory, or its layers.jsonl")
    layers.add_argument("--out", type=Path, metavar="DIR", help="draw figures into it; without it, print the table")
    layers.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures; default: png")
    layers.set_defaults(command=_report_layers)


def _profile(arguments: argparse.Namespace) -> None:
    file, overrides = values.run_file(arguments)
    if file is None:
        raise ConfigError("profile: name the FILE of a run")
    config = load_config(file, overrides)
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
