"""Merges an adapter in files into its base model in files, one weight at a time, and gives the base back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lisa_ds
from lisa_ds import records
from lisa_ds.checkpoint import adapters
from lisa_ds.checkpoint import base as bases
from lisa_ds.checkpoint import changes as adapted
from lisa_ds.checkpoint.base import Base
from lisa_ds.checkpoint.directories import appearing, copy_generation_config, copy_tokenizer, refuse_taken
from lisa_ds.checkpoint.export import DTYPES
from lisa_ds.errors import CheckpointError, ModelError
from lisa_ds.models.stored import CHUNK_BYTES, ComputedTensor, StoredTensor, digest, write

RECORD = "lisa_ds_merge.json"
_PACKAGES = ("torch", "transformers", "peft", "safetensors")

Tensors = dict[str, StoredTensor | ComputedTensor]


def merge(adapter: Path, out: Path, *, base: str | None = None, dtype: str | None = None) -> int:
    """Write the base model with the adapter added as a plain Hugging Face model.

    Each changed weight is computed in fp32 and rounded once; all others are copied. The files have the names, tensors and shards of
    the base's. ``lisa_ds_merge.json`` says what was merged.

    Args:
        adapter: The directory that PEFT's ``save_pretrained`` wrote.
        out: The directory to write. It appears whole or not at all; before, it must be absent or empty.
        base: The base model; by default the one that the adapter names.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default each weight keeps the base's.

    Returns:
        How many weights were changed.

    Raises:
        CheckpointError: The adapter is missing, damaged or of a kind that is not supported, it is not this base's, a merged weight
            is not finite, or ``out`` is taken. Nothing has been written.
        ModelError: The base is missing, truncated or quantised.
    """
    refuse_taken(out)
    config = adapted.read_config(adapter)
    if base is None and not config.base_model_name_or_path:
        raise CheckpointError(f"{adapter}: its adapter_config.json names no base model; name it: --base MODEL")
    weights = adapted.read_weights(adapter)
    found = bases.find(base, None) if base else _named(adapter, config)
    model = bases.skeleton(found.directory)
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    names = bases.names_in_memory(model, found.tensors)
    tied = adapters.tied_names(model)
    changes = adapted.changes(adapter, config, weights, model)
    parted = _parted(tied, changes)
    if parted and _are_tied_without_the_key(found.directory, parted):
        raise CheckpointError(
            f"{adapter}: changes one of {', '.join(sorted(parted))}, which {found.name} ties, and its architecture always ties them"
        )
    chosen = DTYPES[dtype] if dtype else None
    files = _merged_files(found, names, changes, own, _sources(parted, tied, names), chosen)
    with appearing(out) as unfinished:
        for file, tensors in files.items():
            write(unfinished / file.name, tensors)
        if (found.directory / bases.INDEX).is_file():
            _write_json(unfinished / bases.INDEX, _index(files))
        _write_json(unfinished / "config.json", _config(found.directory, bool(parted), dtype))
        copy_generation_config(str(found.directory), unfinished)
        has_tokenizer = (adapter / "tokenizer_config.json").is_file() and copy_tokenizer(str(adapter), unfinished)
        if not has_tokenizer:
            copy_tokenizer(str(found.directory), unfinished)
        _write_json(unfinished / RECORD, _record(found, adapter, dtype, changes))
    return len(changes)


def unmerge(merged: Path, out: Path, *, base: str | None = None) -> None:
    """Write the base model of a merged one, bit for bit: it is read again, as subtracting would not give the same bits.

    Args:
        merged: What :func:`merge` wrote.
        out: The directory to write. It appears whole or not at all; before, it must be absent or empty.
        base: Where the base model is; by default where it was when it was merged.

    Raises:
        CheckpointError: ``merged`` does not say what it was merged from, the base is another one now, or ``out`` is taken.
            Nothing has been written.
        ModelError: The base is missing or truncated.
    """
    refuse_taken(out)
    record = merged / RECORD
    if not record.is_file():
        raise CheckpointError(f"{merged}: holds no {RECORD}, so it was not written by lisa-ds merge")
    try:
        of_base = json.loads(record.read_text(encoding="utf-8"))["base"]
        name, revision, expected = (of_base[key] for key in ("name_or_path", "revision", "tensors_sha256"))
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{record}: is damaged; it does not say what was merged") from None
    found = bases.find(base or name, None if base else revision)
    if digest(found.tensors) != expected:
        raise CheckpointError(
            f"{found.name}: its weights are not those that {merged} was merged from (their SHA-256 differs); name a copy of "
            "these: --base MODEL"
        )
    with appearing(out) as unfinished:
        found.copy_weights(unfinished)
        copy_generation_config(str(found.directory), unfinished)
        copy_tokenizer(str(found.directory), unfinished)


def _named(adapter: Path, config: Any) -> Base:
    try:
        return bases.find(config.base_model_name_or_path, config.revision)
    except ModelError as error:
        raise ModelError(f"{error} ({adapter} names it as its base; say where it is: --base MODEL)") from None


def _merged_files(
    base: Base,
    names: Mapping[str, str | None],
    changes: Mapping[str, adapted.Change],
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, str],
    dtype: torch.dtype | None,
) -> dict[Path, Tensors]:
    """What each file of the base becomes.

    Args:
        base: The base model.
        names: From names in files to names in memory.
        changes: By names in memory.
        shapes: By names in memory.
        sources: For weights that were tied and are so no more, by name in memory: the name in files of what they were loaded from.
        dtype: Of all weights; None for the base's.
    """
    stored = base.tensors

    def become(name: str, tensor: StoredTensor) -> StoredTensor | ComputedTensor:
        """The tensor of the weight that is called ``name`` in memory, from the one that the base has for it."""
        rounded = dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype
        if name not in changes:
            same = rounded == tensor.dtype
            return (
                tensor
                if same
                else ComputedTensor(rounded, tensor.shape, lambda: _rounded(name, tensor.read(), rounded))
            )
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, but by config.json it has {list(shapes[name])}"
            )
        return ComputedTensor(rounded, tensor.shape, lambda: _rounded(name, changes[name](tensor.read()), rounded))

    files: dict[Path, Tensors] = {}
    for file, tensors in base.files.items():
        files[file] = {}
        for name, tensor in tensors.items():
            own = names[name] or ""
            files[file][name] = become(own, stored[sources[own]] if own in sources else tensor)
    missing = changes.keys() - {own for own in names.values() if own is not None}
    last = files[next(reversed(files))]
    for own in sorted(sources.keys() - set(names.values())):  # tied ones that the base does without
        last[own] = become(own, stored[sources[own]])
    if absent := sorted(missing - sources.keys()):
        raise CheckpointError(
            f"{base.name}: has no tensor of its own for {', '.join(absent[:3])}, which the adapter changes; weights that are "
            "joined or split while they are loaded cannot be merged in files"
        )
    return files


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    found = weight.to(dtype)
    if not torch.equal(torch.isfinite(found), torch.isfinite(weight)):
        raise CheckpointError(
            f"{name}: has values that {str(dtype).removeprefix('torch.')} has not; choose another --dtype"
        )
    return found


def _parted(tied: Mapping[str, str], changes: Iterable[str]) -> set[str]:
    """The weights that are tied to one that changes: each of them is to be written on its own."""
    changed = set(changes)
    return {name for group in adapters.tied_groups(tied) if group & changed for name in group}


def _sources(parted: Iterable[str], tied: Mapping[str, str], names: Mapping[str, str | None]) -> dict[str, str]:
    """For tied weights, the name in files of the tensor that transformers loads all of them from."""
    in_files = {own: name for name, own in names.items() if own is not None}
    found = {}
    for own in parted:
        source = tied.get(own, own)
        group = [source, *(name for name in tied if tied[name] == source)]
        found[own] = next(in_files[name] for name in group if name in in_files)
    return found


def _are_tied_without_the_key(directory: Path, parted: set[str]) -> bool:
    still = adapters.tied_names(bases.skeleton(directory, tie_word_embeddings=False))
    return not parted.isdisjoint({*still, *still.values()})


def _index(files: Mapping[Path, Tensors]) -> dict[str, Any]:
    places = {name: file.name for file, tensors in files.items() for name in tensors}
    size = sum(tensor.numel * tensor.dtype.itemsize for tensors in files.values() for tensor in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": places}


def _config(directory: Path, parted: bool, dtype: str | None) -> dict[str, Any]:
    found = bases.read_config(directory)
    if parted:
        found["tie_word_embeddings"] = False
    if dtype:
        found.update({key: dtype for key in ("dtype", "torch_dtype") if key in found} or {"dtype": dtype})
    return found


def _record(base: Base, adapter: Path, dtype: str | None, changes: Iterable[str]) -> dict[str, Any]:
    return {
        "base": {"name_or_path": base.name, "revision": base.revision, "tensors_sha256": digest(base.tensors)},
        "adapter": {"path": str(adapter.resolve()), "sha256": _sha256(adapter / adapters.WEIGHTS)},
        "dtype": dtype or "as in the base",
        "changed": sorted(changes),
        "versions": {"lisa_ds": lisa_ds.__version__, **records.versions(_PACKAGES)},
    }


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
