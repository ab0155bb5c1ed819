"""The commands `check` and `ops`: whether the hosts of a job fit together, and which kernels this machine can run."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lisa_ds.cli import values
from lisa_ds.cluster import environment
from lisa_ds.config import load_config
from lisa_ds.errors import ConfigError, LisaError


def add(commands: values.Commands) -> None:
    """Declare `check` and `ops`."""
    check = commands.add_parser("check", help="see, before a run, whether its hosts fit together")
    values.add_run(check, help="whose paths are checked, too")
    check.add_argument("--timeout", type=values.seconds, default=20.0, metavar="S", help="seconds a step may wait: 20")
    check.add_argument("--hostfile", type=Path, metavar="FILE", help="names hosts whose ranks do not arrive")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(command=_check)

    ops = commands.add_parser("ops", help="print which kernels can be used here, which not, and why")
    ops.add_argument("--build", action="store_true", help="compile those that are not compiled yet, as at first use")
    ops.set_defaults(command=_ops)


def _check(arguments: argparse.Namespace) -> int:
    file, overrides = values.run_file(arguments)
    config = load_config(file, overrides) if file else None
    if overrides and not config:
        raise ConfigError(f"command line: {overrides[0]!r} is a key of a run: give its file, --lisa_config")
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


def _ops(arguments: argparse.Namespace) -> None:
    from lisa_ds.ops import report

    print("\n".join(report.lines(build=arguments.build)))
