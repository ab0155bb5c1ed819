"""Which model is evaluated, by the words of the command line, and the run that it is from; reads no weights."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lisa_ds import records
from lisa_ds.config import RunConfig, from_fields, load_config
from lisa_ds.config.lora import ADAPTER_CONFIG
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.models import resolve
from lisa_ds.run_log import RECORDS


@dataclass(frozen=True)
class Subject:
    """A model by its name."""

    name: str
    """As it was given."""

    model: str
    """What ``from_pretrained`` reads; of an adapter, its base model."""

    adapter: Path | None = None
    """The directory of a PEFT adapter."""

    run: Path | None = None
    """The output directory of the run that made it."""

    revision: str | None = None
    """Of an adapter's base on the hub, as the adapter names it."""

    @property
    def title(self) -> str:
        """A short name: that of the run, or the last part of its own."""
        place = self.run or Path(os.path.expanduser(self.name))
        return place.resolve().name if place.is_dir() else place.name


def find(name: str) -> Subject:
    """The model that ``name`` means: a directory, a run's output directory, a name on the hub or a built-in one.

    Raises:
        ModelError: There is none, or an adapter's base model is missing.
    """
    place = Path(os.path.expanduser(name))
    if not os.path.isdir(place):
        resolve(name)
        return Subject(name, name)
    if _is_model(place):
        made_by_run = place.name == "model" and (place.parent / RECORDS).is_file()
        return _in_directory(name, place, place.parent if made_by_run else None)
    if _is_model(place / "model"):
        return _in_directory(name, place / "model", place)
    what = "holds neither config.json nor adapter_config.json, nor a run's model/"
    if checkpoints := sorted(place.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime):
        what += f"; make a model of a checkpoint with `lisa-ds export {checkpoints[-1]} {place / 'model'}`"
    raise ModelError(f"{name}: {what}")


def _is_model(place: Path) -> bool:
    return (place / "config.json").is_file() or (place / ADAPTER_CONFIG).is_file()


def _in_directory(name: str, place: Path, run: Path | None) -> Subject:
    file = place / ADAPTER_CONFIG
    if not file.is_file():
        return Subject(name, str(place), run=run)
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        base, revision = saved.get("base_model_name_or_path"), saved.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: is damaged: {error}; save the adapter again") from None
    where = f"{file}: base_model_name_or_path"
    if not base or not isinstance(base, str):
        raise ModelError(f"{where}: should name the model that the adapter was trained on, got {base!r}")
    if revision is not None and not isinstance(revision, str):
        raise ModelError(f"{file}: revision: should be a branch, tag or commit, or null, got {revision!r}")
    try:
        resolve(base)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    if find_spec("peft") is None:
        raise ModelError(f"{place}: holds an adapter, for which peft is not installed; pip install 'lisa-ds[peft]'")
    return Subject(name, base, adapter=place, run=run, revision=revision)


def settings(subject: Subject, file: str | None, overrides: Sequence[str]) -> RunConfig:
    """Model and data of an evaluation: those of ``file``, of the run that made the model, or of the overrides alone.

    Args:
        subject: The model, which takes the place of the run's own.
        file: The file of a run.
        overrides: ``key=value`` of the sections ``model`` and ``data``.

    Raises:
        ConfigError: A key that an evaluation does not read, or a mistake in the file.
        DataError: The run's records cannot be read.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key == "model.name_or_path":
            raise ConfigError(f"command line: {key}: the model is the first word after evaluate, got {override!r}")
        if key.partition(".")[0] not in ("model", "data"):
            raise ConfigError(f"command line: {key}: an evaluation reads model and data alone; leave it out")
    recorded = _recorded(subject.run) if subject.run and file is None else None
    given = {word.partition("=")[0] for word in overrides}
    of_a_run = file is not None or recorded is not None
    if of_a_run and given & {"data.eval_path", "data.eval_split", "data.eval_fraction"}:  # other rows, and all of them
        overrides = [*_held_out_again(given), *overrides]
    named = [*overrides, f"model.name_or_path={json.dumps(subject.model)}"]
    if subject.revision is not None and "model.revision" not in given:
        named.append(f"model.revision={json.dumps(subject.revision)}")
    if not of_a_run:
        path = next((word.partition("=")[2] for word in overrides if word.startswith("data.eval_path=")), "none")
        return from_fields({"data": {"path": path}}, "", named)

    def read(words: Sequence[str]) -> RunConfig:
        if recorded:
            return from_fields({key: recorded[key] for key in ("model", "data")}, f"{subject.run}/{RECORDS}", words)
        return load_config(str(file), words)

    if read(overrides).model.name_or_path != subject.model:  # these two are of the run's own model
        known = given if subject.revision is None else {*given, "model.revision"}
        named += [f"{key}=null" for key in ("model.revision", "model.num_labels") if key not in known]
    return read(named)


def _held_out_again(given: Collection[str]) -> list[str]:
    """Overrides by which nothing is left of what a run held out; ``data.eval_split`` alone is of the same data."""
    keys = {
        "eval_path": "null",
        "eval_split": "null",
        "eval_fraction": "0",
        "eval_part": "all",
        "eval_max_rows": "null",
    }
    if not {"data.eval_path", "data.eval_fraction"} & set(given):
        del keys["eval_path"]
    return [f"data.{key}={value}" for key, value in keys.items() if f"data.{key}" not in given]


def before_training(subject: Subject, file: str | None) -> Subject:
    """What a run's model was before: the run's base, or with ``lora.adapter`` that base with the adapter that was gone on with.

    Raises:
        ConfigError: No run is known, or the adapter is gone.
        DataError: The run's records cannot be read.
    """
    if subject.run is None:
        raise ConfigError(f"--samples: takes the output directory of a run, whose samples it holds, got {subject.name}")
    if file is not None:
        config = load_config(file)
        name, adapter = config.model.name_or_path, config.lora.adapter if config.method == "lora" else None
    elif recorded := _recorded(subject.run):
        name, adapter = str(recorded["model"]["name_or_path"]), None
        if recorded.get("method") == "lora" and isinstance(recorded.get("lora"), dict):
            adapter = recorded["lora"].get("adapter")
    else:
        raise ConfigError(
            f"--samples: {subject.run / RECORDS} does not say which model was trained; name the run's file, --lisa_config FILE"
        )
    if adapter is None:
        return replace(find(name), run=subject.run)
    place = Path(os.path.expanduser(adapter))
    if not (place / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"--samples: the run went on with the adapter in {adapter!r}, which is not there (looked from {Path.cwd()})"
        )
    return Subject(adapter, name, adapter=place, run=subject.run)


def _recorded(run: Path) -> dict[str, Any] | None:
    """The config of a run, from its records; None where they do not hold the sections ``model`` and ``data``."""
    path, found = run / RECORDS, None
    for record in records.read(path) if path.is_file() else ():
        config = record.settings.get("config")
        if isinstance(config, dict) and isinstance(config.get("model"), dict) and isinstance(config.get("data"), dict):
            found = config
    return found
