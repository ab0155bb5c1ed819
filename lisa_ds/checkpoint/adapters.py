"""Checkpoints of PEFT models: recognises them, and rebuilds the model that their weights belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lisa_ds.errors import CheckpointError

_CONFIG = "adapter_config.json"
_NAMED = re.compile(r"\.(?:lora_\w+|modules_to_save|ia3_l|\w+_layers)\.([^.]+)\.")

NO_CONFIG = f"there is no {_CONFIG} in it or beside it"


def config_beside(checkpoint: Path) -> Any | None:
    """The adapter's config in a checkpoint, or in the directory of one of its tags; None if there is none.

    Raises:
        CheckpointError: PEFT is not installed.
    """
    place = next((place for place in (checkpoint, checkpoint.parent) if (place / _CONFIG).is_file()), None)
    if place is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError:
        raise CheckpointError(f"{place / _CONFIG}: is of an adapter; to read it, pip install peft") from None
    return PeftConfig.from_pretrained(str(place))


def are_of_adapters(names: Iterable[str]) -> bool:
    """Whether weights have the names that PEFT gives those of the models it wraps."""
    return any(name.startswith("base_model.model.") for name in names)


def wrapped(skeleton: Any, config: Any, names: Iterable[str]) -> Any:
    """``skeleton`` wrapped with the adapters that ``config`` describes, which are on the meta device too.

    Args:
        skeleton: The base model, without values.
        config: The adapter's config.
        names: Names of the weights to be loaded; they contain the adapter's name.
    """
    import torch
    from peft import get_peft_model

    called = {found[1] for name in names if (found := _NAMED.search(name))}
    config.inference_mode = False  # else modules_to_save would be left out
    with torch.device("meta"):
        return get_peft_model(skeleton, config, adapter_name=called.pop() if len(called) == 1 else "default")
