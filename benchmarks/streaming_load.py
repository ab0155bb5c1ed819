"""The most that a rank holds while a sharded checkpoint is loaded under ZeRO-3, streamed and by transformers' own loader.

Usage: python benchmarks/streaming_load.py --out docs/results/streaming_load.jsonl

A Llama of random bf16 weights (1.3 GB by default, in shards of at most 50 MB) is written and then loaded by two gloo ranks as a
run of launch/train.py loads it. Counted is the growth of each process's resident memory, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from lisa_ds import records
from tests.ranks import run_ranks
from tests.zero3.streaming_runs import peaks
from tests.zero3.test_streaming import write_large_model


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; replaced if it exists")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = write_large_model(Path(folder) / "model", arguments.layers)
        ranks = run_ranks(arguments.ranks, peaks, Path(folder), Path(folder) / "model", timeout_s=600)
    arguments.out.unlink(missing_ok=True)
    for rank, loaders in enumerate(ranks):
        for loader, seen in loaders.items():
            settings = {"rank": rank, "ranks": arguments.ranks, "shards": shards, **seen}
            records.append(
                arguments.out,
                records.Record(
                    name="load_peak_resident",
                    variant=loader,
                    value=seen["peak"],
                    unit="bytes",
                    device="CPU",
                    commit=records.commit(),
                    versions=records.versions(),
                    settings=settings,
                ),
            )
            print(
                f"rank {rank} {loader:9} peak {seen['peak'] / 1e6:8.1f} MB, partitions {seen['partitions'] / 1e6:8.1f} MB, "
                f"largest tensor {seen['largest'] / 1e6:6.1f} MB, model {seen['whole'] / 1e6:8.1f} MB, {shards} shards"
            )


if __name__ == "__main__":
    main()
