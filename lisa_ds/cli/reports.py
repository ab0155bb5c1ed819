"""The command `report`: draw what runs have recorded, as a page or layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path

from lisa_ds.cli import values
from lisa_ds.errors import ConfigError


def add(commands: values.Commands) -> None:
    """Declare `report`, and `report layers`."""
    report = commands.add_parser(
        "report",
        help="draw what runs have recorded, on one HTML page or by layer",
        usage="%(prog)s DIR [DIR ...] [--out FILE]\n       %(prog)s layers RUN [RUN ...] [--out DIR]",
        default_command="page",
    )
    report.set_defaults(command=lambda _: report.print_help())
    reports = report.add_subparsers(title="what", metavar="WHAT", prog="lisa-ds report")
    page = reports.add_parser("page", help="an HTML page; meant where WHAT is left out")
    page.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="of a run, or of a comparison")
    page.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in DIR, if it is one DIR")
    page.set_defaults(command=_page)
    layers = reports.add_parser("layers", help="norms of weights, gradients, updates; visits, probabilities")
    layers.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an output directory, or its layers.jsonl")
    layers.add_argument("--out", type=Path, metavar="DIR", help="draw figures into it; without it, print the table")
    layers.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures; default: png")
    layers.set_defaults(command=_layers)


def _page(arguments: argparse.Namespace) -> None:
    from lisa_ds.report import page

    directories: list[Path] = arguments.directories
    if arguments.out is None and len(directories) > 1:
        raise ConfigError("report: say where to write a page of several runs, as in --out report.html")
    out = arguments.out or directories[0] / page.FILE_NAME
    print(*page.write(directories, out), f"wrote {out}", sep="\n")


def _layers(arguments: argparse.Namespace) -> None:
    from lisa_ds.report import layers

    histories = layers.load(arguments.runs)
    print("\n".join(layers.lines(histories)))
    if arguments.out is not None:
        print("", *(f"wrote {path}" for path in layers.draw(histories, arguments.out, arguments.format)), sep="\n")
