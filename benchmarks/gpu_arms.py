"""Stage e of the GPU proof: many small training runs side by side on one card, for questions of quality.

    python benchmarks/gpu_arms.py --out RECORDS --arms FILE [--workers 12] [--limit-s 300] [--device cuda]

FILE (YAML or JSON) names what is compared::

    model: builtin:smollm2-135m       # name or directory
    data:                             # by name, `data` sections of a run file
      roleplay: {path: roleplay.json, max_length: 256, eval_fraction: 0.3}
    steps: 60
    batch: 8
    seeds: [0, 1, 2]
    arms:                             # on every data set, or on the one that `data` names; `method` is lisa, full or none
      - {arm: full, method: full, lr: 1.5e-4}
      - {arm: LISA 2, method: lisa, lr: 1.0e-3, lisa: {num_sampled_layers: 2, interval_steps: 5}}

Runs are those of ``ablate.py``, and are paired: the first seed of every arm comes before the second. A run whose record is in RECORDS
is not repeated. Without a network, prepare the tokens beforehand: ``--prepare`` needs the data and writes them to ``--cache``, which is
enough elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not

import ablate_run
from ablate_plan import Run
from campaign import Campaign, Losses, Settings

from benchmarks.gpu_claims import Claim, Report, device_name
from lisa_ds import records
from lisa_ds.cache import cache_dir
from lisa_ds.config.files import read_mapping
from lisa_ds.evidence import PARTS

CLAIMS: list[Claim] = []  # which arm is better is what is asked
KEYS: dict[str, type | tuple[type, ...]] = {
    "model": str, "data": Mapping, "steps": int, "batch": int, "seeds": list, "select_rows": int, "verdict_rows": int,
    "bf16": bool, "arms": list,
}  # fmt: skip
DEFAULTS = {"steps": 60, "batch": 8, "seeds": [0], "select_rows": 240, "verdict_rows": 480, "bf16": True}
ARM_KEYS: dict[str, type | tuple[type, ...]] = {
    "arm": str, "data": str, "method": str, "lr": (int, float), "steps": int, "batch": int, "lisa": Mapping,
}  # fmt: skip
METHODS = ("lisa", "full", "none")


def main() -> None:
    """Run what is missing while there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="without --arms: a toy file, on the CPU")
    parser.add_argument("--limit-s", type=float, default=300)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--cache", type=Path, default=cache_dir() / "ablate", help="tokens are kept here")
    parser.add_argument("--prepare", action="store_true", help="only tokenise")
    arguments = parser.parse_args()
    report = (
        None
        if arguments.prepare
        else Report(arguments.out, "e", dry_run=arguments.dry_run or arguments.device == "cpu")
    )
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.dry_run:
            arguments.device, arguments.cache = "cpu", Path(scratch)
            arguments.arms = arguments.arms or _toy(Path(scratch))
        if arguments.arms is None:
            parser.error("--arms is needed")
        try:
            asked = read(arguments.arms)
        except ValueError as error:
            parser.error(str(error))
        if report is None:
            for name, source in asked["data"].items():
                ablate_run.tokens(source, asked["model"], ablate_run.token_file(arguments.cache, name, source))
            return
        wanted = runs(asked)
        campaign = Campaign(
            Settings(
                out=arguments.out,
                model=asked["model"],
                datasets=asked["data"],
                cache=arguments.cache,
                limits={part: asked[f"{part}_rows"] for part in PARTS},
                device=arguments.device,
                workers=arguments.workers or (12 if arguments.device == "cuda" else 1),
                bf16=asked["bf16"],
                deadline_s=arguments.limit_s,
                commit=report.commit,
                device_name="CPU, dry run"
                if arguments.dry_run
                else device_name()
                if arguments.device == "cuda"
                else None,
            ),
            lambda losses, closed: [run for run in wanted if run.key not in losses and run.key not in closed],
        )
        campaign.run()
        for arm, reason in sorted({**campaign.refused, **campaign.failed}.items()):
            report.write("failed", arm, 1, "failure", error=reason[:500])
    _print(campaign.losses, wanted)


def read(file: Path) -> dict[str, Any]:
    """The file of arms, with what it leaves out filled in.

    Raises:
        ValueError: A key is unknown, missing or of a wrong type; the message names file and key.
    """
    found = {**DEFAULTS, **read_mapping(file)}
    _check(found, KEYS, str(file), ("model", "data", "arms"))
    for number, arm in enumerate(found["arms"]):
        at = f"{file}: arms[{number}]"
        _check(arm, ARM_KEYS, at, ("arm", "method"))
        if arm["method"] not in METHODS:
            raise ValueError(f"{at}: method: should be one of {', '.join(METHODS)}, got {arm['method']!r}")
        if arm["method"] != "none" and "lr" not in arm:
            raise ValueError(f"{at}: lr: is missing")
        if ("lisa" in arm) != (arm["method"] == "lisa"):
            raise ValueError(f"{at}: lisa: is for method lisa, which needs it")
        if arm.get("data", next(iter(found["data"]), None)) not in found["data"]:
            raise ValueError(f"{at}: data: should be one of {', '.join(found['data'])}, got {arm.get('data')!r}")
    return found


def _check(section: Any, kinds: Mapping[str, Any], at: str, needed: Sequence[str]) -> None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{at}: should hold keys and values, got {section!r}")
    for key, value in section.items():
        if key not in kinds:
            raise ValueError(f"{at}: {key}: unknown key; there are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and kinds[key] is not bool):
            raise ValueError(f"{at}: {key}: is of a wrong type: {value!r}")
    if missing := [key for key in needed if key not in section]:
        raise ValueError(f"{at}: {missing[0]}: is missing")


def runs(asked: Mapping[str, Any]) -> list[Run]:
    """Every run, seed by seed, so that whatever there is when time runs out is paired."""
    return [
        Run(
            arm=arm["arm"],
            stage="e",
            settings={
                "model": asked["model"],
                "data": data,
                "source": dict(asked["data"][data]),
                "method": arm["method"],
                "lisa": dict(arm["lisa"]) if "lisa" in arm else None,
                "lr": float(arm.get("lr", 0.0)),
                "steps": 0 if arm["method"] == "none" else arm.get("steps", asked["steps"]),
                "batch": arm.get("batch", asked["batch"]),
                "seed": seed,
                "bf16": asked["bf16"],
                "select_rows": asked["select_rows"],
                "verdict_rows": asked["verdict_rows"],
            },
        )
        for i, seed in enumerate(asked["seeds"])
        for arm in asked["arms"]
        for data in ([arm["data"]] if "data" in arm else asked["data"])
        if i == 0 or arm["method"] != "none"  # nothing is drawn
    ]


def _toy(folder: Path) -> Path:
    """A tiny model, a few rows, and an arm of each method."""
    from tests import tiny

    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.alpaca, 40)
    file = folder / "arms.yaml"
    file.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{sums: {{path: {folder / 'rows.jsonl'}, max_length: 64, eval_fraction: 0.3}}}}\n"
        "steps: 4\nbatch: 2\nseeds: [0, 1]\narms:\n"
        "  - {arm: before, method: none}\n"
        "  - {arm: full, method: full, lr: 1.0e-2}\n"
        "  - {arm: LISA 1, method: lisa, lr: 1.0e-2, lisa: {num_sampled_layers: 1, interval_steps: 2}}\n"
    )
    return file


def _print(losses: Losses, wanted: Sequence[Run]) -> None:
    done = sum(run.key in losses for run in wanted)
    print(f"e: {done} of {len(wanted)} runs are measured", flush=True)


def table(found: Sequence[records.Record]) -> list[str]:
    """A line of Markdown for every arm and data set: held-out loss, mean and range over seeds. Nothing without records."""
    losses: dict[tuple[str, str], list[float]] = {}
    for record in found:
        if record.name == "verdict_loss" and record.settings.get("stage") == "e":
            losses.setdefault((record.settings["data"], record.variant), []).append(record.value)
    if not losses:
        return []
    lines = ["| data | arm | held-out loss, nats | seeds |", "|---|---|---|---|"]
    for (data, arm), values in losses.items():
        spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
        lines.append(f"| {data} | {arm} | {statistics.mean(values):.4f}{spread} | {len(values)} |")
    return lines


if __name__ == "__main__":
    main()
