"""Which of LISA's options pay? Held-out loss of a real model after fine-tuning on real data, option by option.

Usage: python benchmarks/ablate.py --out docs/results/ablation.jsonl [--stage all] [--workers 8] [--device cuda] [--deadline-s 360]
       python benchmarks/ablate.py --out docs/results/ablation.jsonl --stage report --doc docs/ablation.md --figure docs/results/ablation.png

`rates` chooses the learning rates of the base and of full fine-tuning on each data set, `screen` changes one factor of the base at a
time, `final` trains the best option of every factor on fresh seeds, `report` writes the tables from the records alone. Choices are
made on one part of the held-out rows and read on the other. A run whose record is in the file is not repeated, so a run that was cut
short is continued by the same command. docs/ablation.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ablate_run
from ablate_plan import DATA, Progress, Protocol
from campaign import Campaign, Settings

from lisa_ds import records
from lisa_ds.cache import cache_dir

STAGES = ("rates", "screen", "final")


def main() -> None:
    """Run what is missing, then report."""
    arguments = parse()
    if arguments.stage == "report":
        return report(arguments)
    datasets = present(arguments)
    if arguments.prepare:
        for name, source in datasets.items():
            rows = ablate_run.tokens(source, arguments.model, ablate_run.token_file(arguments.cache, name, source))
            print(f"{name}: " + ", ".join(f"{len(part)} {key}" for key, part in rows.items()))
        return None
    protocol = Protocol(
        device=arguments.device,
        datasets=tuple(datasets),
        steps=arguments.steps,
        final_steps=arguments.final_steps,
        batch=arguments.batch,
        select_rows=arguments.select_rows,
        verdict_rows=arguments.verdict_rows,
        model=arguments.model_name,
    )
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    settings = Settings(
        out=arguments.out,
        model=arguments.model,
        datasets=datasets,
        cache=arguments.cache,
        limits={"select": protocol.select_rows, "verdict": protocol.verdict_rows},
        device=protocol.device,
        workers=arguments.workers,
        deadline_s=arguments.deadline_s,
        max_runs=arguments.max_runs,
        commit=arguments.commit,
    )
    Campaign(settings, lambda losses, closed: Progress(protocol, losses, closed).open(stages)).run()
    if arguments.doc or arguments.figure:
        report(arguments)
    return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--stage", choices=["all", *STAGES, "report"], default="all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the data sets lie")
    parser.add_argument("--datasets", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--cache", type=Path, default=cache_dir() / "ablate", help="tokens are kept here")
    parser.add_argument("--prepare", action="store_true", help="only tokenise")
    parser.add_argument("--model", default=Protocol.model, help="name or directory of the model")
    parser.add_argument("--model-name", default=Protocol.model, help="what the records call it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one rank; on a GPU they share it")
    parser.add_argument(
        "--deadline-s", type=float, help="seconds from now after which no run starts that would not end"
    )
    parser.add_argument("--max-runs", type=int, help="so many at most, for a try")
    parser.add_argument("--steps", type=int, default=Protocol.steps, help="of a run of `rates` and `screen`")
    parser.add_argument("--final-steps", type=int, default=Protocol.final_steps)
    parser.add_argument("--batch", type=int, default=Protocol.batch)
    parser.add_argument("--select-rows", type=int, default=Protocol.select_rows)
    parser.add_argument("--verdict-rows", type=int, default=Protocol.verdict_rows)
    parser.add_argument("--commit", help="what the records say, where there is no checkout to ask")
    parser.add_argument("--doc", type=Path, help="Markdown whose part between the marks is replaced by the tables")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return arguments


def present(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The data sets that are there, as ``data`` sections; of the others it is said that they are not."""
    found = {}
    for name in arguments.datasets:
        source = {**DATA[name], "path": str(arguments.data / DATA[name]["path"])}
        if Path(source["path"]).is_file() or ablate_run.token_file(arguments.cache, name, source).is_file():
            found[name] = source
        else:
            print(f"{name}: skipped, there is no {source['path']}")
    if not found:
        sys.exit(f"ablate: no data set in {arguments.data}; name their directory by --data")
    return found


def report(arguments: argparse.Namespace) -> None:
    """Tables and figure, from the records."""
    import ablate_report

    text = ablate_report.tables(list(records.read(arguments.out)))
    if arguments.doc:
        ablate_report.insert(arguments.doc, text)
    else:
        print(text)
    if arguments.figure:
        ablate_report.draw(list(records.read(arguments.out)), arguments.figure)


if __name__ == "__main__":
    main()
