"""Would optimizer state for only those rows of the embedding that occur pay? Shares of rows and bytes, by data, batch and interval.

Usage: python benchmarks/embedding_rows.py --out docs/results/embedding_rows.jsonl [--data ../shared/data] [--no-step]

An input embedding has a gradient in the rows of the tokens that occur; state for these alone, kept for an interval, needs as many rows
as there are different tokens in all its steps. A weight that is tied to the head gets a gradient from the softmax as well: one real
step counts in how many rows it is not zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ablate_run
import numpy as np
from ablate_plan import DATA, MODEL

from lisa_ds import records
from lisa_ds.cache import cache_dir

BATCHES = (4, 8, 16, 32, 64, 128)
INTERVALS = (5, 20)
WINDOWS = 20
STATE_BYTES = 12  # of an element: master copy and two moments
INDEX_BYTES = 4  # of a kept row: which it is; and of every row of the vocabulary: where it is kept


def distinct(rows: Sequence[Any], count: int, seed: int) -> int:
    """Different tokens in ``count`` rows drawn at random, none twice before all have been drawn."""
    random = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < count:
        order += random.permutation(len(rows)).tolist()
    return len(set().union(*(rows[i]["input_ids"] for i in order[:count])))


def bytes_of(rows: int, vocabulary: int, width: int, *, sparse: bool) -> int:
    """Optimizer state of ``rows`` rows of an embedding, with what it takes to find them if it is sparse."""
    return rows * width * STATE_BYTES + (INDEX_BYTES * (rows + vocabulary) if sparse else 0)


def sweep(data: str, rows: Sequence[Any], vocabulary: int, width: int) -> Iterator[records.Record]:
    """Shares and bytes for every batch and interval."""
    dense = bytes_of(vocabulary, vocabulary, width, sparse=False)
    for interval in INTERVALS:
        for batch in BATCHES:
            counts = [distinct(rows, batch * interval, seed) for seed in range(WINDOWS)]
            settings = {
                "data": data,
                "interval_steps": interval,
                "rows_drawn": batch * interval,
                "rows_there": len(rows),
                "vocabulary": vocabulary,
                "width": width,
            }
            share = records.spread([count / vocabulary for count in counts])
            sizes = records.spread([bytes_of(c, vocabulary, width, sparse=True) / dense for c in counts])
            for name, found in (("rows_with_input_gradient", share), ("state_sparse_to_dense", sizes)):
                yield make(name, data, found, x=batch, settings=settings)


def step(data: str, rows: Sequence[Any], model_name: str, batch: int = 4) -> Iterator[records.Record]:
    """One backward of the real model: rows of the tied weight with a gradient, and of an input embedding of its own."""
    import torch

    from lisa_ds.config import ModelConfig
    from lisa_ds.models import load_model

    chosen = ablate_run.collate(list(rows[:batch]))
    occurring = set(chosen["input_ids"][chosen["attention_mask"] == 1].tolist())
    labels = torch.nn.functional.pad(chosen["labels"][:, 1:], (0, 1), value=ablate_run.IGNORED)
    kept = labels != ablate_run.IGNORED
    model = load_model(ModelConfig(name_or_path=model_name), torch.float32)
    weight = model.get_input_embeddings().weight
    for tied in (True, False):
        weight.grad = None
        head = weight if tied else weight.detach().clone()
        hidden = model.model(chosen["input_ids"], attention_mask=chosen["attention_mask"]).last_hidden_state
        torch.nn.functional.cross_entropy(hidden[kept] @ head.T, labels[kept]).backward()
        squares = weight.grad.double().square().sum(1)
        touched = set(torch.nonzero(squares)[:, 0].tolist())
        inside = float(squares[sorted(occurring)].sum() / squares.sum())
        settings = {
            "data": data,
            "batch": batch,
            "occurring": len(occurring),
            "touched": len(touched),
            "only_occurring": touched <= occurring,
            "share_of_squared_norm_in_occurring": inside,
        }
        share = records.spread([len(touched) / len(weight)])
        name = "rows_with_gradient_one_step"
        yield make(name, data, share, x=batch, settings={**settings, "tied": tied})


def make(name: str, data: str, found: records.Spread, x: float, settings: dict[str, Any]) -> records.Record:
    """A share, with all it takes to believe it."""
    return records.Record(
        name=name,
        variant=data,
        value=found.value,
        low=found.low,
        high=found.high,
        n=found.n,
        unit="share",
        x=x,
        x_label="rows in a step",
        device="CPU",
        commit=records.commit(),
        versions=records.versions(),
        settings=settings,
    )


def main() -> None:
    """Measure every data set that is there, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; written anew")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=cache_dir() / "ablate", help="tokens are kept here")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--no-step", action="store_true", help="leave out the step of the real model")
    arguments = parser.parse_args()
    from lisa_ds.config import ModelConfig
    from lisa_ds.models import model_config

    shape = model_config(ModelConfig(name_or_path=arguments.model))
    arguments.out.unlink(missing_ok=True)
    for data, source in DATA.items():
        source = {**source, "path": str(arguments.data / source["path"])}
        cache = ablate_run.token_file(arguments.cache, data, source)
        if not Path(source["path"]).is_file() and not cache.is_file():
            print(f"{data}: skipped, there is no {source['path']}")
            continue
        rows = ablate_run.tokens(source, arguments.model, cache)["train"]
        measured = list(sweep(data, rows, shape["vocab_size"], shape["hidden_size"]))
        measured += [] if arguments.no_step else step(data, rows, arguments.model)
        for record in measured:
            records.append(arguments.out, record)
            s = record.settings
            about = f"K {s['interval_steps']:2}" if "interval_steps" in s else f"tied {s['tied']}, {s}"
            print(f"{data:9} {record.name:28} batch {record.x:4.0f} {about}: {record.value:.4f}", flush=True)


if __name__ == "__main__":
    main()
