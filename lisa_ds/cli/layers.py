"""The command `profile`: score a model's layers before a run."""

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
    """Declare `profile`."""
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
