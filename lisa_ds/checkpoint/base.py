"""The model that an adapter was trained on, as files: its config, its safetensors files, and the names its weights have in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from lisa_ds.errors import ModelError
from lisa_ds.models import resolve
from lisa_ds.models.fitness import weight_files
from lisa_ds.models.stored import StoredTensor, stored_tensors

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Base:
    """A model in files; of the weights, only the headers have been read."""

    name: str
    """As it can be found again: ``builtin:...``, an absolute path, or a name on the hub."""

    revision: str | None
    """Of a model on the hub, the commit."""

    directory: Path
    files: dict[Path, dict[str, StoredTensor]]
    """Weights by file and name."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Weights by name."""
        return {name: stored for tensors in self.files.values() for name, stored in tensors.items()}

    def copy_weights(self, target: Path) -> None:
        """Copy files of weights, their index and the config, byte by byte."""
        for file in [*self.files, self.directory / INDEX, self.directory / "config.json"]:
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def find(name: str, revision: str | None = None) -> Base:
    """The base model called ``name``.

    Args:
        name: A directory, ``builtin:...`` or a name on the hub, from which it is downloaded if it is not in the cache.
        revision: Of a model on the hub.

    Raises:
        ModelError: It is not there, not in safetensors files, quantised, or a file is truncated.
    """
    source = resolve(name)
    if os.path.isdir(source):
        directory, commit = Path(source), None
        found_as = name if name.startswith("builtin:") else str(directory.resolve())
    else:
        directory = _fetch(source, revision)
        found_as, commit = source, directory.name
    files = weight_files(directory, name)
    if other := next((file for file in files if file.suffix != ".safetensors"), None):
        raise ModelError(
            f"{name}: its weights are in {other.name}; load it once and save it as safetensors: save_pretrained(DIRECTORY)"
        )
    if "quantization_config" in read_config(directory):
        raise ModelError(
            f"{name}: its weights are quantised, and an adapter cannot be added to them; name the model it was made from"
        )
    return Base(found_as, commit, directory, {file: stored_tensors(file) for file in files})


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a model as it is written.

    Raises:
        ModelError: It is no JSON object.
    """
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{directory / 'config.json'}: is damaged; copy or download it again")
    return found


def skeleton(directory: Path, **changes: Any) -> Any:
    """The model on the meta device, of the class that its config names.

    Args:
        directory: Holds the config.
        changes: Keys of the config to be replaced.

    Raises:
        ModelError: transformers cannot build it.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), **changes)
        architecture = (config.architectures or ["none"])[0]
        if not hasattr(transformers, architecture):
            raise ModelError(
                f"{directory}: its config names the architecture {architecture!r}, which transformers does not have"
            )
        with torch.device("meta"):
            return getattr(transformers, architecture)._from_config(config, dtype=torch.float32)
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory}: no model could be built from its config: {_one_line(error)}") from error


def names_in_memory(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, str | None]:
    """For each name in files, the name of that weight in ``model``; None if it is merged or split on the way."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name in stored:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        found[name] = None if converted else renamed
    return found


def _fetch(name: str, revision: str | None) -> Path:
    """The snapshot of a model of the hub in the cache, with config, index and weights."""
    optional = {"_raise_exceptions_for_missing_entries": False}
    try:
        directory = Path(cached_file(name, "config.json", revision=revision)).parent
        index = cached_file(name, INDEX, revision=revision, **optional)
        if index is None:
            cached_file(name, "model.safetensors", revision=revision, **optional)
        else:
            for file in set(json.loads(Path(index).read_text())["weight_map"].values()):
                cached_file(name, file, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{name}: there is no such directory (looked from {Path.cwd()}), and the hub does not give it: {_one_line(error)}"
        ) from error
    return directory


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
