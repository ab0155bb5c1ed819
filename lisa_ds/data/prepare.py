"""Builds rows of tokens from the ``data`` section of a config, once on a machine."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import tokenizers
import transformers

from lisa_ds.cache import build_once
from lisa_ds.config import DataConfig
from lisa_ds.data import formats
from lisa_ds.data.answers import Note
from lisa_ds.data.build import Part, build
from lisa_ds.data.fields import Unused
from lisa_ds.data.ignored import leave_out
from lisa_ds.data.sources import Source, open_source
from lisa_ds.data.templates import set_chat_template
from lisa_ds.data.tokenise import IGNORED, Status, Tokeniser, fingerprint, prepare_tokenizer
from lisa_ds.errors import DataError

_log = logging.getLogger(__name__)

_NOTED = {
    Note.THOUGHT_LEFT_OUT: "hold reasoning in earlier answers, which the chat template writes in the last alone: "
    "those answers are learned without it",
    Note.ASKED_OTHERWISE: "hold answers that the chat template does not begin as it asks for them: the model is trained "
    "on another beginning than it is given in use",
    Note.NO_END: "hold answers that end with no special token of the tokenizer's: the model is not taught to stop",
    Note.NOT_MARKED: "hold answers outside the chat template's {% generation %} marks: those are not learned",
}


def load_dataset(
    config: DataConfig, tokenizer: Any, *, task: str = "causal_lm"
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows of tokens to train on, and to evaluate on if the config holds some out.

    Rows have ``input_ids`` and ``labels``: a list with -100 where there is no loss, or the class. The first process
    on a machine builds them; the others wait, and read what it built.

    Args:
        config: The ``data`` section.
        tokenizer: The model's. Its chat template is set to ``data.chat_template``, or to a default if it needs one and
            has none.
        task: ``causal_lm`` or ``sequence_classification``.

    Raises:
        DataError: Data is missing, malformed or empty, or does not go with the other settings.
        ConfigError: ``data.chat_template`` is not a chat template.
    """
    set_chat_template(tokenizer, config)
    train = _train_part(config, tokenizer, task)
    return train, _held_out(config, tokenizer, task, tuple(label_names(train) or ()), told=config.eval_fraction > 0)


def load_held_out(
    config: DataConfig, tokenizer: Any, *, task: str = "causal_lm", labels: tuple[str, ...] | None = None
) -> datasets.Dataset | None:
    """The held-out rows alone, as :func:`load_dataset` returns them; None if the config holds none out.

    Args:
        config: The ``data`` section.
        tokenizer: The model's; its chat template is set as by :func:`load_dataset`.
        task: ``causal_lm`` or ``sequence_classification``.
        labels: Names of the classes in the model's order; None to take those of the rows that are trained on.

    Raises:
        DataError: As by :func:`load_dataset`.
        ConfigError: As by :func:`load_dataset`.
    """
    if not (config.eval_path or config.eval_split or config.eval_fraction):
        return None
    set_chat_template(tokenizer, config)
    if task == "causal_lm":
        labels = ()
    elif labels is None:
        labels = tuple(label_names(_train_part(config, tokenizer, task)) or ())
    return _held_out(config, tokenizer, task, labels, told=False)


def _train_part(config: DataConfig, tokenizer: Any, task: str) -> datasets.Dataset:
    source = open_source(config.path, config.split, config.where("path"))
    return _load(source, Part(low=config.eval_fraction, max_rows=config.max_rows), config, tokenizer, task)


def _held_out(
    config: DataConfig, tokenizer: Any, task: str, labels: tuple[str, ...], *, told: bool
) -> datasets.Dataset | None:
    half = config.eval_part if config.eval_part != "all" else None
    part = Part(high=config.eval_fraction or 1.0, max_rows=config.eval_max_rows, half=half)
    if config.eval_path or config.eval_split:
        key = config.where("eval_path" if config.eval_path else "eval_split")
        source = open_source(config.eval_path or config.path, config.eval_split or "train", key)
    elif config.eval_fraction:
        source = open_source(config.path, config.split, config.where("path"))
    else:
        return None
    return _load(source, part, config, tokenizer, task, labels, told=told)


def label_names(rows: datasets.Dataset) -> list[str] | None:
    """Names of the classes, or None if they are numbers or the rows are not for classification."""
    feature = rows.features["labels"]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def num_labels(rows: datasets.Dataset) -> int | None:
    """How many classes there are, or None if the rows are not for classification."""
    if names := label_names(rows):
        return len(names)
    return int(max(rows["labels"])) + 1 if isinstance(rows.features["labels"], datasets.Value) else None


def describe(rows: datasets.Dataset) -> str:
    """Rows and tokens in one line, such as ``412 rows, 51,402 tokens (17,620 with loss), longest 276``."""
    table = rows.with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"])
    tokens = f"{pc.sum(lengths).as_py():,} tokens"
    if isinstance(rows.features["labels"], type(rows.features["input_ids"])):
        learned = pc.not_equal(pc.list_flatten(table["labels"]), IGNORED)
        tokens += f" ({pc.sum(learned).as_py():,} with loss)"
    return f"{len(rows):,} rows, {tokens}, longest {pc.max(lengths).as_py():,}"


def preview(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of a row for people to read, with the parts that carry loss in ``⟦ ⟧``."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != IGNORED
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    return "".join(f"⟦{text}⟧" if learned else text for learned, ids in runs for text in [tokenizer.decode(ids)])


def _load(
    source: Source,
    part: Part,
    config: DataConfig,
    tokenizer: Any,
    task: str,
    labels: tuple[str, ...] | None = None,
    told: bool = False,
) -> datasets.Dataset:
    """A part of a source; ``told`` says that its unused fields were already reported with another part."""
    first = next(source.rows(), None)
    if first is None:
        raise DataError(f"{source.name}: holds no rows")
    try:
        kept = leave_out(first, config.ignore, Counter())
        form = formats.tell(formats.rename(kept, config.columns), config.format)
    except RecursionError:
        raise DataError(f"{first.place}: nested too deeply") from None
    _check(form, config, task, source.name)
    prepare_tokenizer(tokenizer, form.kind)
    tokeniser = Tokeniser(
        tokenizer,
        form.kind,
        config.max_length,
        loss_on_all=config.loss_on == "all",
        drop_too_long=config.on_too_long == "drop",
        cut_later=config.packing,
        labels=labels,
    )
    settings = {"format", "columns", "ignore", "max_length", "packing", "loss_on", "on_too_long", "seed"}
    recipe = [
        (source.name, source.fingerprint, asdict(part), labels),
        (config.model_dump(include=settings), fingerprint(tokenizer), _code()),
    ]
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]

    def fill(target: Path) -> None:
        build(
            target,
            source,
            part,
            form,
            tokeniser,
            columns=config.columns,
            ignore=config.ignore,
            seed=config.seed,
            packed=config.packing,
            num_workers=config.num_workers,
        )

    place = build_once(f"data/{key}", fill)
    counts = json.loads((place / "counts.json").read_text())
    _report(source.name, counts, config)
    if not told:
        if left_out := [f"{key!r} ({number:,} times)" for key, number in counts["ignored"].items()]:
            _log.warning("%s: left out as data.ignore says: %s", source.name, ", ".join(left_out))
        for line in Unused(**{what: Counter(names) for what, names in counts["unused"].items()}).told():
            _log.warning("%s: %s", source.name, line)
    return datasets.Dataset.from_file(str(place / "rows.arrow"))


def _check(form: formats.Form, config: DataConfig, task: str, name: str) -> None:
    if (form.kind == "classification") != (task == "sequence_classification"):
        fitting = "causal_lm" if task == "sequence_classification" else "sequence_classification"
        other = ", or data.format: text to learn the texts alone" if form.kind == "classification" else ""
        raise DataError(f"{name}: rows are {form.name}, but model.task is {task!r}; set model.task: {fitting}{other}")
    if config.chat_template is not None and form.kind not in ("conversation", "pair"):
        raise DataError(f"{name}: rows are {form.name}, which go through no chat template; remove data.chat_template")
    if config.packing and form.kind != "text":
        raise DataError(
            f"{name}: rows are {form.name}, but data.packing joins plain texts, so that tokens of one row attend to "
            f"those of another; set data.packing: false"
        )


def _report(name: str, found: dict[str, Any], config: DataConfig) -> None:
    """Report the rows that were lost, also of a data set from the cache, which is as much shorter."""
    counts = found["rows"]
    what = {
        Status.CUT: f"cut at data.max_length {config.max_length}",
        Status.TOO_LONG: f"dropped, longer than data.max_length {config.max_length}",
        Status.NO_ANSWER: f"dropped, nothing to learn within data.max_length {config.max_length}",
    }
    lost = [f"{counts[status.name]:,} {text}" for status, text in what.items() if counts.get(status.name)]
    if lost and not config.packing:
        _log.warning("%s: of %s rows, %s", name, f"{sum(counts.values()):,}", "; ".join(lost))
    for note, text in _NOTED.items():
        if number := found["notes"][str(note.name)]:
            _log.warning("%s: %s of %s rows %s", name, f"{number:,}", f"{sum(counts.values()):,}", text)


@cache
def _code() -> str:
    """What rows of tokens depend on besides the settings: the code of this package, and versions of libraries."""
    digest = hashlib.sha256(repr([m.__version__ for m in (datasets, tokenizers, transformers)]).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
