"""Gives the tensors of an exported model the names they have in the files that the model was loaded from.

transformers may rename and merge tensors while it loads them, and reverts most of that when it saves. It does not know
whether a file had the base model's prefix or not, drops one of two names of a tied weight, and leaves out what it has
no use for, such as the causal masks in GPT-2's files or the layers of a token predictor. Tools that read a model by the
names it was published under miss them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lisa_ds.models.stored import StoredTensor, stored_tensors, write


def stored_in(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all safetensors files of a model's directory."""
    return {
        name: stored
        for file in sorted(directory.glob("*.safetensors"))
        for name, stored in stored_tensors(file).items()
    }


def undo_what_was_done(model: Any, names: Iterable[str]) -> None:
    """Have ``save_pretrained`` revert the renamings that transformers applied to these names, and no others."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    for name in names:
        rename_source_key(name, renamings, converters, model.base_model_prefix, known)
    model._weight_conversions = used(conversions)


def used(conversions: Iterable[Any]) -> list[Any]:
    """The renamings and conversions that transformers has applied; all, in releases that do not record them."""
    return [entry for entry in conversions if not hasattr(entry, "was_used") or entry.was_used()]


def restore(directory: Path, inputs: Mapping[str, StoredTensor], model: Any) -> None:
    """Give the tensors in ``directory``, which ``model.save_pretrained`` wrote, the names that they have in ``inputs``.

    Args:
        directory: Holds the safetensors files; unchanged if they have those names already.
        inputs: The tensors that the model was loaded from, by name.
        model: The model that was saved; its weights are not read.
    """
    prefix = f"{model.base_model_prefix}."
    saved = {
        file: {_input_name(name, inputs, prefix): stored for name, stored in stored_tensors(file).items()}
        for file in sorted(directory.glob("*.safetensors"))
    }
    if not saved:
        return
    present = {name: stored for tensors in saved.values() for name, stored in tensors.items()}
    last = saved[max(saved)]
    for name in sorted(inputs.keys() - present.keys()):
        if (twin := _twin(name, present, model, prefix)) is not None:
            last[name] = present[twin]
        elif _is_of_no_use(name, model) and inputs[name].path.is_file():
            last[name] = inputs[name]
    for tensors in saved.values():  # of tied weights, the names that the input does without
        for name in [name for name in tensors if name not in inputs and _twin(name, inputs, model, prefix) is not None]:
            del tensors[name]
    changed = [file for file, tensors in saved.items() if tensors.keys() != stored_tensors(file).keys()]
    written = {file: file.with_name(f".{file.name}.renamed") for file in changed}
    for file, place in written.items():  # before any is replaced: one may hold tensors of another
        write(place, saved[file])
    for file, place in written.items():
        place.replace(file)
    index = directory / "model.safetensors.index.json"
    if changed and index.is_file():
        found = json.loads(index.read_text())
        found["weight_map"] = {name: file.name for file, tensors in saved.items() for name in tensors}
        sizes = (t.numel * t.dtype.itemsize for tensors in saved.values() for t in tensors.values())
        found.setdefault("metadata", {})["total_size"] = sum(sizes)
        index.write_text(json.dumps(found, indent=2) + "\n")


def _input_name(name: str, inputs: Collection[str], prefix: str) -> str:
    """What ``name`` was called before a prefix was put on it or taken off."""
    others = (name, name.removeprefix(prefix), prefix + name)
    return next((other for other in others if other in inputs), name)


def _twin(name: str, present: Collection[str], model: Any, prefix: str) -> str | None:
    """The name under which the tensor tied to ``name`` was saved."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for own in (name, prefix + name, name.removeprefix(prefix)):
        source = tied.get(own, own)
        for other in (source, *(key for key, its_source in tied.items() if its_source == source)):
            for spelled in (other, other.removeprefix(prefix)):
                if other != own and spelled in present:
                    return spelled
    return None


def _is_of_no_use(name: str, model: Any) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
