"""``from_pretrained`` under ZeRO-3 where each rank reads its own partition of each weight and nothing else.

transformers lets rank 0 map the whole checkpoint, gathers one weight at a time on every rank, copies on rank 0 and broadcasts.
Here the two functions that do it are replaced inside a ``with``: first only the header of each file is read, and then
each rank reads its slice of each tensor straight into the partition. Everything else (finding files, building the model
partitioned, renaming keys, tying weights, drawing a new head) stays transformers' own.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import modeling_utils
from transformers.core_model_loading import WeightConverter
from transformers.integrations import deepspeed as hf_deepspeed

from lisa_ds.checkpoint.names import used
from lisa_ds.engines.zero3 import partition
from lisa_ds.errors import ModelError
from lisa_ds.models.stored import StoredTensor, stored_tensors

logger = logging.getLogger("lisa_ds")

_READ, _FILL, _RENAME = (
    "load_state_dict",
    "_load_state_dict_into_zero3_model",
    "_apply_weight_conversions_to_state_dict",
)
_INPUTS = "_lisa_inputs"  # an attribute of the model
_NUMBERED = re.compile(r"\.\d+\.")  # inside a stack of blocks
_SHOWN = 5


@contextmanager
def streamed() -> Iterator[None]:
    """Inside the ``with``, a model that is built partitioned is filled by every rank from its own slices of the files.

    Where that cannot be done, transformers' loader takes over and a warning says why: weights that must be merged or split
    on the way (experts, say), files other than safetensors, partitions that are quantised, on NVMe, or kept twice (hpZ).

    Raises:
        ModelError: Inside: a file is truncated, or its weights are not those of the model; names file and key.
    """
    if not (hasattr(modeling_utils, _READ) and hasattr(modeling_utils, _FILL) and hasattr(hf_deepspeed, _RENAME)):
        _say("the checkpoint is read by transformers' loader, by rank 0 as a whole: this release has another one")
        yield
        return
    loader = _Loader(getattr(modeling_utils, _READ), getattr(modeling_utils, _FILL))
    setattr(modeling_utils, _READ, loader.describe)
    setattr(modeling_utils, _FILL, loader.fill)
    try:
        yield
    finally:
        setattr(modeling_utils, _READ, loader.stock_read)
        setattr(modeling_utils, _FILL, loader.stock_fill)


def inputs_of(model: Any) -> dict[str, StoredTensor]:
    """The tensors in files that ``model`` was filled from; none if it was not filled here, or from other files."""
    found: dict[str, StoredTensor] = getattr(model, _INPUTS, {})
    return found


class _Loader:
    """The replacements of transformers' two functions, and the originals, to fall back on."""

    def __init__(self, read: Callable[..., Any], fill: Callable[..., Any]) -> None:
        self.stock_read = read
        self.stock_fill = fill
        self._asked: dict[Path, Callable[[], dict[str, Any]]] = {}  # file -> how transformers would have read it

    def describe(self, file: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Tensors of a safetensors file on the meta device, each with its place; of other files, the tensors."""
        read = functools.partial(self.stock_read, file, *args, **kwargs)
        if not os.fspath(file).endswith(".safetensors"):
            return read()
        described = {}
        for name, stored in stored_tensors(Path(file)).items():
            tensor: Any = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            tensor.stored = stored
            described[name] = tensor
        self._asked[Path(file)] = read
        return described

    def fill(self, model: Any, state_dict: Mapping[str, Any], load_config: Any = None) -> tuple[list[str], set[str]]:
        """Fill this rank's partitions; returns transformers' error messages, of which there are none, and missing keys."""
        transforms = list(getattr(load_config, "weight_mapping", None) or ())
        setattr(model, _INPUTS, {key: tensor.stored for key, tensor in state_dict.items() if hasattr(tensor, "stored")})
        result = self._fill(model, state_dict, load_config, transforms)
        # To be undone when it is saved, as transformers has it where there is no ZeRO-3: what was done, and nothing else.
        model._weight_conversions = used(transforms)
        return result

    def _fill(
        self, model: Any, state_dict: Mapping[str, Any], load_config: Any, transforms: list[Any]
    ) -> tuple[list[str], set[str]]:
        if reason := _unfit(model, state_dict, transforms):
            _say(f"the checkpoint is read by transformers' loader, by rank 0 as a whole: {reason}")
            return self.stock_fill(model, self._as_asked(state_dict), load_config)
        sources = _renamed(model, state_dict, transforms)
        missing = _check(model, sources, _without_place(model, state_dict, sources))
        filled: set[int] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in sources and id(parameter) not in filled:
                partition.fill(parameter, sources[name].stored.read_into)
                parameter._is_hf_initialized = True
                filled.add(id(parameter))
        for name, buffer in model.named_buffers():
            if name in sources:
                flat = torch.empty(buffer.numel(), dtype=buffer.dtype)
                sources[name].stored.read_into(flat)
                buffer.copy_(flat.view(buffer.shape))
                buffer._is_hf_initialized = True
        return [], missing

    def _as_asked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: tensor for key, tensor in state_dict.items() if not hasattr(tensor, "stored")}
        for file in {tensor.stored.path: None for tensor in state_dict.values() if hasattr(tensor, "stored")}:
            values.update(self._asked[file]())
        return values


def _unfit(model: Any, state_dict: Mapping[str, Any], transforms: Iterable[Any]) -> str | None:
    """Why the weights cannot be streamed; None if they can."""
    if any(isinstance(transform, WeightConverter) for transform in transforms):
        return f"the weights of {type(model).__name__} are merged or split while they are loaded"
    if not all(hasattr(tensor, "stored") for tensor in state_dict.values()):
        return "the checkpoint is not in safetensors files"
    if not all(map(partition.is_plain, model.parameters())):
        return "partitions are quantised, on NVMe, or kept twice (hpZ)"
    return None


def _renamed(model: Any, state_dict: Mapping[str, Any], transforms: list[Any]) -> dict[str, Any]:
    """The described tensors by their name in the model; those that have none are left out."""
    if transforms:
        found = getattr(hf_deepspeed, _RENAME)(model, state_dict, transforms)
        parts = [found] if isinstance(found, Mapping) else list(found)  # a generator in later releases
        state_dict = {key: tensor for part in parts for key, tensor in part.items()}
    known = model.state_dict().keys()
    prefix = model.base_model_prefix
    named = {f"{prefix}.{key}" if f"{prefix}.{key}" in known else key: tensor for key, tensor in state_dict.items()}
    return {key: tensor for key, tensor in named.items() if key in known}


def _check(model: Any, sources: Mapping[str, Any], unexpected: list[str]) -> set[str]:
    """Compare the files with the model; the result is equal on all ranks, as each has read every header.

    Returns:
        The keys that are missing and may be: tied ones, and a new head's.

    Raises:
        ModelError: Others are missing, or a shape differs.
    """
    problems, absent = [], []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted = tuple(parameter.ds_shape)
        if name in sources and (stored := sources[name].stored).shape != wanted:
            problems.append(
                f"{stored.path}: {stored.name} has shape {list(stored.shape)}, but by config.json it has {list(wanted)}"
            )
        elif _names_of(model, name).isdisjoint(sources) and not _may_be_new(model, name):
            absent.append(name)
    hidden = len(problems) - _SHOWN
    problems[_SHOWN:] = [f"... and {hidden} more such tensors"] if hidden > 0 else []
    if absent:
        problems.append(
            f"{model.config.name_or_path}: no file of it has {_listed(absent)}; is a shard missing, or config.json another's?"
        )
        problems += [f"the model has no place for {_listed(unexpected)}"] if unexpected else []
    if problems:
        raise ModelError("\n".join(problems))
    if unexpected:
        _say(f"the model has no place for {_listed(unexpected)} of its checkpoint")
    return model.state_dict().keys() - sources.keys()


def _names_of(model: Any, name: str) -> set[str]:
    """``name`` and those of the weights tied to it, which at this point are still parameters of their own."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(name, name)
    return {name, source, *(key for key, its_source in tied.items() if its_source == source)}


def _may_be_new(model: Any, name: str) -> bool:
    """Whether a weight that is in no file may be drawn at random: outside the blocks of a model without an output head.

    That is the classifier, and maybe the pooler, of a model for another task than the checkpoint's.
    """
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ()):
        return True
    in_a_block = name.startswith(f"{model.base_model_prefix}.") and _NUMBERED.search(name)
    return model.get_output_embeddings() is None and not in_a_block


def _without_place(model: Any, state_dict: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """Tensors of the files that no weight is filled from, except those that transformers knows to be unused."""
    used = {id(tensor) for tensor in sources.values()}
    useless = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return [
        key
        for key, tensor in state_dict.items()
        if id(tensor) not in used and not any(re.search(pattern, key) for pattern in useless)
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _say(reason: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("%s", reason)
