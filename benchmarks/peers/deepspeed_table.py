"""The table of benchmarks/peers/deepspeed_tests.sh: what DeepSpeed's tests say of stock and of ours."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

STOCK, *OURS = RUNS = ("stock", "masked_adamw", "adamw")


def outcomes(file: Path) -> dict[str, tuple[str, str]]:
    """Of each test that asked for a ZeRO-3 engine: what became of it, and the last word on it if it failed.

    Skipped tests asked for none; they are told as well, as are those that broke before they could ask.
    """
    found = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        engines = {item.get("name"): int(item.get("value", 0)) for item in case.iter("property")}.get("engines", 0)
        bad = [case.find(kind) for kind in ("failure", "error")]
        message = next((part.get("message", "") for part in bad if part is not None), "")
        outcome = "failed" if message else "skipped" if case.find("skipped") is not None else "passed"
        if engines or outcome != "passed":
            found[name] = (outcome, " ".join(message.split()))
    return found


def main() -> None:
    """Print a row for each class of tests, then each test that passes on stock alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the script left its results")
    folder = parser.parse_args().folder
    results = {run: outcomes(folder / f"{run}.xml") for run in RUNS if (folder / f"{run}.xml").is_file()}
    print("| test | " + " | ".join(f"{run}: passed / failed / skipped" for run in results) + " |")
    print("|---" * (len(results) + 1) + "|")
    tests = dict.fromkeys(name.partition("[")[0] for found in results.values() for name in found)
    for test in [*tests, ""]:
        counts = [
            Counter(outcome for name, (outcome, _) in found.items() if name.startswith(test))
            for found in results.values()
        ]
        row = [" / ".join(str(count[kind]) for kind in ("passed", "failed", "skipped")) for count in counts]
        print(f"| {test or 'all'} | " + " | ".join(row) + " |")
    for run in results.keys() & set(OURS):
        for name, (outcome, message) in results[run].items():
            if outcome != "passed" and results[STOCK].get(name, ("",))[0] == "passed":
                print(f"only stock passes, {run}: {name}: {message[:300]}")


if __name__ == "__main__":
    main()
