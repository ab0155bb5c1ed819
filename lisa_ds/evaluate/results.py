"""What an evaluation measured, as lines of text and as records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lisa_ds import records
from lisa_ds.evaluate.harness import Score
from lisa_ds.evaluate.loss import HeldOutLoss

Value = tuple[str, float, str, int, Mapping[str, Any]]
"""Of a record its name, value, unit, number of samples, and settings of its own."""


def loss_lines(found: HeldOutLoss) -> list[str]:
    """A held-out loss as text."""
    if found.accuracy is not None:
        return [f"held-out loss {found.loss:.6f}, accuracy {found.accuracy:.4f} ({found.rows:,} rows)"]
    tokens = f"{found.tokens:,} tokens with loss in {found.rows:,} rows"
    return [f"held-out loss per token {found.loss:.6f}, perplexity {found.perplexity:.4f} ({tokens})"]


def loss_values(found: HeldOutLoss) -> Iterator[Value]:
    """A held-out loss as records."""
    if found.accuracy is not None:
        yield "held_out_loss_per_row", found.loss, "nats", found.rows, {}
        yield "held_out_accuracy", found.accuracy, "share", found.rows, {}
        return
    yield "held_out_loss_per_token", found.loss, "nats", found.tokens, {"rows": found.rows}
    yield "held_out_perplexity", found.perplexity, "", found.tokens, {"rows": found.rows}


def score_lines(scores: Iterable[Score]) -> list[str]:
    """Scores of tasks as text."""
    return [
        f"{each.task}: {each.metric} {each.value:.4f}"
        + (f" ± {each.stderr:.4f}" if each.stderr is not None else "")
        + f" ({each.n:,} rows"
        + (f", {each.num_fewshot}-shot)" if each.num_fewshot is not None else ")")
        + (f", {each.filter}" if each.filter != "none" else "")
        for each in scores
    ]


def score_values(scores: Iterable[Score]) -> Iterator[Value]:
    """Scores of tasks as records; the settings hold the standard error."""
    for each in scores:
        own = {name: getattr(each, name) for name in ("task", "metric", "filter", "stderr", "num_fewshot", "version")}
        yield f"{each.task}/{each.metric}", each.value, "", each.n, own


def write(path: Path, variant: str, device: str, values: Sequence[Value], settings: Mapping[str, Any]) -> list[str]:
    """Append records to a file; a number that is not finite is left out, as JSON has no word for it.

    Args:
        path: The file.
        variant: The model's short name.
        device: In words.
        values: Of the functions above.
        settings: What all of them share: model, data, precision.

    Returns:
        The names of those that were left out.
    """
    commit, versions = records.commit(), records.versions((*records.PACKAGES, "peft", "lm_eval"))
    for name, value, unit, n, own in values:
        if math.isfinite(value):
            record = records.Record(
                name=name,
                variant=variant,
                value=value,
                unit=unit,
                n=n,
                device=device,
                commit=commit,
                versions=versions,
                settings={**settings, **own},
            )
            records.append(path, record)
    return [name for name, value, *_ in values if not math.isfinite(value)]
