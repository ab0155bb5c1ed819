"""The command `compare`: variants of a run on the same rows, with learning rates searched alike, and a verdict on other rows."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_ds.cli import values
from lisa_ds.compare.protocol import SCREEN_SEED, TRIES
from lisa_ds.errors import ConfigError
from lisa_ds.files import whole
from lisa_ds.terminal import INTERRUPTED

if TYPE_CHECKING:
    from lisa_ds.compare.request import Request

FAILED = 1
"""Exit code where some run has failed."""


def add(commands: values.Commands) -> None:
    """Declare `compare`."""
    compare = commands.add_parser("compare", help="train methods, or variants of a run, and draw how they compare")
    values.add_run(compare, help="a YAML or JSON file with held-out data; --lisa_config FILE says the same")
    compare.add_argument(
        "--out", type=Path, metavar="DIR", help="where runs, records, table and figures go; continued if it is there"
    )
    compare.add_argument(
        "--methods", default="", metavar="A,B", help="names of methods, an arm each; the first is compared with"
    )
    compare.add_argument(
        "--arms",
        type=Path,
        metavar="FILE",
        help="more arms: NAME: {method: lisa, lisa.interval_steps: 5, rates: [1e-3]}",
    )
    compare.add_argument("--seeds", default="0,1,2", metavar="N,N", help="of the verdict; default: 0,1,2")
    compare.add_argument(
        "--rates", type=values.count, metavar="N", help=f"learning rates that each arm tries; default: {TRIES}"
    )
    compare.add_argument(
        "--screen-seed", type=int, default=SCREEN_SEED, metavar="N", help=f"seed of that search; default: {SCREEN_SEED}"
    )
    compare.add_argument("--against", metavar="ARM", help="the arm that others are compared with; default: the first")
    compare.add_argument(
        "--num-gpus", type=values.count, metavar="N", help="of each run, or CPU ranks where there are no GPUs"
    )
    compare.add_argument(
        "--workers", type=values.count, default=1, metavar="N", help="runs at a time; they share the GPUs"
    )
    compare.add_argument(
        "--deadline-s", type=values.count, metavar="S", help="seconds after which nothing runs any more"
    )
    compare.add_argument(
        "--drop-models", action="store_true", help="keep no trained model; default: those of the verdict"
    )
    compare.add_argument("--force", action="store_true", help="try runs that the planner says cannot fit")
    compare.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    compare.add_argument(
        "--report-only", action="store_true", help="write table and figures anew from the records in --out"
    )
    compare.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.out is None:
        raise ConfigError("compare: name a directory: --out DIR")
    if arguments.report_only:
        _report(arguments.out)
        return 0
    from lisa_ds.compare import arms, campaign, rehearsal
    from lisa_ds.compare.request import Request

    file, overrides = values.run_file(arguments)
    if file is None:
        raise ConfigError(
            "compare: name the FILE of a run; or --report-only for the report of a comparison that has been made"
        )
    ranks, on_cpu = _ranks(arguments.num_gpus)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    request = Request(
        file=file,
        overrides=tuple(overrides),
        arms=tuple(arms.read(methods, arguments.arms)),
        seeds=_seeds(arguments.seeds),
        out=arguments.out,
        ranks=ranks,
        on_cpu=on_cpu,
        num_gpus=arguments.num_gpus,
        screen_seed=arguments.screen_seed,
        tries=arguments.rates,
        against=arguments.against,
    )
    if arguments.dry_run:
        return _tell(request)
    options = campaign.Options(
        workers=arguments.workers,
        deadline_s=arguments.deadline_s,
        keeps_models=not arguments.drop_models,
        force=arguments.force,
        command=shlex.join(["lisa-ds", *sys.argv[1:]]),
    )
    made = campaign.Campaign(request, options, lambda: rehearsal.rehearse(request, force=arguments.force))
    made.run()
    _report(arguments.out)
    if made.interrupted:
        return INTERRUPTED if made.interrupted == signal.SIGINT else 0  # as `lisa-ds train` does
    return FAILED if made.failures else 0


def _seeds(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) < 2**32 for word in words):
        raise ConfigError(f"--seeds: should be whole numbers, 0 or more, with commas, such as 0,1,2, got {text!r}")
    seeds = tuple(dict.fromkeys(map(int, words)))
    if len(seeds) < len(words):
        raise ConfigError(f"--seeds: should be different numbers, got {text!r}")
    return seeds


def _ranks(num_gpus: int | None) -> tuple[int, bool]:
    """Ranks of a run, and whether they are on the CPU.

    Raises:
        ConfigError: The launcher would refuse to start them.
    """
    from lisa_ds.train import launcher

    devices = launcher.num_devices()
    launcher.options(launcher.Where(num_gpus), devices, os.environ)
    return num_gpus or devices or 1, not devices


def _tell(request: Request) -> int:
    protocol = request.protocol
    for arm in request.arms:
        changes = ", ".join(f"{key}: {value}" for key, value in arm.changes.items())
        tried = ", ".join(f"{rate:.3g}" for rate in protocol.rates[arm.name])
        print(f"{arm.name}: {{{changes}}}; learning rates {tried}")
    searched = (
        f"{len(next(iter(protocol.rates.values())))} learning rates with seed {protocol.screen_seed}, then "
        if protocol.searches
        else ""
    )
    print(
        f"{protocol.num_runs} runs: of each arm {searched}seeds {', '.join(map(str, protocol.seeds))}; compared with {request.reference}"
    )
    return 0


def _report(out: Path) -> None:
    """Write the table and the figures; the table appears whole or not at all."""
    from lisa_ds.compare.collect import FILE
    from lisa_ds.report.comparison import figures, read, table

    found = read.load(out / FILE)
    target = out / "comparison.md"
    try:
        with whole(target) as unfinished:
            unfinished.write_text(table.markdown(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None
    print(f"wrote {target}")
    if find_spec("matplotlib") is None:
        print("no figures: they take matplotlib: pip install 'lisa-ds[plots]'")
        return
    written, left_out = figures.draw(found, out)
    print(*(f"wrote {path}" for path in written), *left_out, sep="\n")
