"""Checkpoints of PEFT models: recognises them, and rebuilds the model that their weights belong to."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lisa_ds.config import ModelConfig
from lisa_ds.config.lora import ADAPTER_CONFIG
from lisa_ds.errors import CheckpointError, ModelError
from lisa_ds.models import skeleton
from lisa_ds.models.stored import stored_tensors

_NAMED = re.compile(r"\.(?:lora_\w+|modules_to_save|ia3_l|\w+_layers)\.([^.]+)\.")

WEIGHTS = "adapter_model.safetensors"
_INCOMPLETE = "Found missing adapter keys"  # how PEFT's warning begins; it goes on with random values

NO_CONFIG = f"there is no {ADAPTER_CONFIG} in it or beside it"


def config_beside(checkpoint: Path) -> Any | None:
    """The adapter's config in a checkpoint, or in the directory of one of its tags; None if there is none.

    Raises:
        CheckpointError: PEFT is not installed.
    """
    place = next((place for place in (checkpoint, checkpoint.parent) if (place / ADAPTER_CONFIG).is_file()), None)
    return None if place is None else load_config(place)


def load_config(directory: Path) -> Any:
    """The config of an adapter in a directory.

    Raises:
        CheckpointError: PEFT is not installed, or cannot read it.
    """
    file = directory / ADAPTER_CONFIG
    try:
        from peft import PeftConfig
    except ImportError:
        raise CheckpointError(f"{file}: is of an adapter; to read it, pip install peft") from None
    try:
        return PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: PEFT cannot read it: {' '.join(str(error).split())}") from None


def are_of_adapters(names: Iterable[str]) -> bool:
    """Whether weights have the names that PEFT gives those of the models it wraps."""
    return any(name.startswith("base_model.model.") for name in names)


def wrapped(base: Any, config: Any, names: Iterable[str]) -> Any:
    """``base`` wrapped with the adapters that ``config`` describes, which are on the meta device too.

    Args:
        base: The base model, without values.
        config: The adapter's config.
        names: Names of the weights to be loaded; they contain the adapter's name.
    """
    import torch
    from peft import get_peft_model

    called = {found[1] for name in names if (found := _NAMED.search(name))}
    config.inference_mode = False  # else modules_to_save would be left out
    with torch.device("meta"):
        return get_peft_model(base, config, adapter_name=called.pop() if len(called) == 1 else "default")


def adapted_layers(model: Any) -> dict[str, Any]:
    """PEFT's layers in ``model``, by name: none if it is not PEFT's, or has no adapter inside its layers."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def tied_names(model: Any) -> dict[str, str]:
    """From a weight of a model that no adapter is in to the one it is tied to."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: source for name, source in tied.items() if name in own and source in own}


def tied_groups(tied: Mapping[str, str]) -> list[set[str]]:
    """The names of each weight that has several."""
    return [{source, *(name for name in tied if tied[name] == source)} for source in sorted(set(tied.values()))]


def tied_and_adapted(model: Any, tied: Mapping[str, str]) -> list[str]:
    """The names of a tied weight of which one is adapted, or saved with an adapter; none if there is no such weight.

    Args:
        model: The base model, now wrapped by PEFT.
        tied: What :func:`tied_names` said before.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return next((sorted(group) for group in tied_groups(tied) if not group <= own), [])


def loaded(model: Any, place: Path, *, trains: bool = False) -> Any:
    """``model`` with a saved adapter, in the type of the weights beside it.

    Args:
        model: The adapter's base. It is changed.
        place: The adapter's directory.
        trains: Whether it is trained on.

    Raises:
        ModelError: It cannot be read, is incomplete, or belongs to another model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=_INCOMPLETE)
            return PeftModel.from_pretrained(
                model, str(place), is_trainable=trains, autocast_adapter_dtype=False, torch_device="cpu"
            )
    except UserWarning as warning:
        missing = re.findall("'([^']+)'", str(warning))
        raise ModelError(f"{place}: {lacks(missing)}") from None
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ModelError(
            f"{place}: the adapter cannot be read, or does not fit its base model: {' '.join(str(error).split())}"
        ) from error


def check(base: Any, place: Path) -> None:
    """Refuse what :func:`loaded` would refuse, before the weights of the base are read.

    Args:
        base: The base model on the meta device, which stays as it is.
        place: The adapter's directory.

    Raises:
        ModelError: As by :func:`loaded`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is copied to the meta device
        loaded(copy.deepcopy(base), place)


def with_classes(config: ModelConfig, place: Path) -> ModelConfig:
    """``config`` with as many classes as the classifier has that is saved with an adapter; unchanged for another task.

    Args:
        config: The adapter's base and the task.
        place: The adapter's directory.

    Raises:
        ModelError: No classifier is saved with it, or one for another number of classes.
    """
    if config.task != "sequence_classification":
        return config
    stored = stored_tensors(place / WEIGHTS) if (place / WEIGHTS).is_file() else {}
    one, other = (skeleton(config.model_copy(update={"num_labels": number})) for number in (2, 3))
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    for name, parameter in one.named_parameters():
        apart = [i for i, pair in enumerate(zip(parameter.shape, shapes[name], strict=True)) if pair == (2, 3)]
        if not apart or (saved := stored.get(f"base_model.model.{name}")) is None:
            continue
        found = saved.shape[apart[0]]
        if config.num_labels not in (None, found):
            raise ModelError(
                f"{config.where('num_labels')}: the adapter in {place} tells {found} classes apart, got {config.num_labels}; leave it out"
            )
        return config.model_copy(update={"num_labels": found})
    raise ModelError(f"{place}: {WEIGHTS} holds no classifier for task 'sequence_classification'")


def lacks(names: Sequence[str]) -> str:
    """Says which weights an adapter lacks."""
    return f"lacks {listed(names)}, which {ADAPTER_CONFIG} asks for"


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
