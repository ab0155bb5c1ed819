"""What a PEFT adapter in files makes of the weights of its base model, one weight at a time."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisa_ds.checkpoint import adapters
from lisa_ds.checkpoint.adapters import WEIGHTS, listed
from lisa_ds.config.lora import ADAPTER_CONFIG
from lisa_ds.errors import CheckpointError
from lisa_ds.models.stored import StoredTensor, stored_tensors

_PREFIX = "base_model.model."

# Keys of adapter_config.json that are honoured, or say nothing about the weights.
# fmt: off
_HONOURED = frozenset((
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_dora", "eva_config", "runtime_config",
))
# fmt: on
# Other starting values (pissa, olora, loftq, corda, ...) were subtracted from the base's weights.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")

Change = Callable[[Tensor], Tensor]
"""From a weight of the base, in fp32, to the merged one, in fp32."""


def read_config(adapter: Path) -> Any:
    """The config of an adapter that can be merged here.

    Raises:
        CheckpointError: There is none, it is damaged, or it asks for what is not supported; names the key.
    """
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter}: no such directory (looked from {Path.cwd()})")
    file = adapter / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{adapter}: holds no {ADAPTER_CONFIG}, so it is no adapter as PEFT saves it")
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        kind = written.get("peft_type")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file}: is damaged; copy it again") from None
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind}; only LORA, with DoRA and rsLoRA, can be merged in files")
    if written.get("task_type") == "SEQ_CLS":
        raise CheckpointError(
            f"{file}: task_type is SEQ_CLS, and an adapter with a classifier cannot be merged in files; load it with PEFT beside its "
            "base, or merge it there: merge_and_unload()"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of keys that it does not know: they are refused below
        config = adapters.load_config(adapter)
    defaults = {field.name: getattr(type(config)(), field.name) for field in dataclasses.fields(config)}
    for key, value in written.items():
        if key not in _HONOURED and value and value != defaults.get(key):
            raise CheckpointError(
                f"{file}: {key} is {json.dumps(value)}, and such an adapter cannot be merged in files"
            )
    if config.init_lora_weights not in _STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {config.init_lora_weights!r}, which changed the base's weights before the training; "
            "save the adapter as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return config


def read_weights(adapter: Path) -> dict[str, StoredTensor]:
    """The headers of an adapter's weights.

    Raises:
        CheckpointError: There is no safetensors file.
        ModelError: It is truncated.
    """
    file = adapter / WEIGHTS
    if not file.is_file():
        other = " (adapter_model.bin is read by PEFT alone: save it again)" * (adapter / "adapter_model.bin").is_file()
        raise CheckpointError(f"{adapter}: holds no {WEIGHTS}{other}")
    return stored_tensors(file)


def changes(adapter: Path, config: Any, stored: Mapping[str, StoredTensor], skeleton: Any) -> dict[str, Change]:
    """The weights that an adapter changes, by their names in ``skeleton``, and how.

    The arithmetic is PEFT's, of one module at a time.

    Args:
        adapter: Its directory, for error messages.
        config: As :func:`read_config` gives it.
        stored: As :func:`read_weights` gives it.
        skeleton: The base model on the meta device. It is wrapped by PEFT afterwards.

    Raises:
        CheckpointError: Config and weights, or adapter and base, do not belong together.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters(remove_duplicate=False)}
    config.init_lora_weights = True  # of a model without values any start is as good
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, which are parted here
            whole = adapters.wrapped(skeleton, config, ())
            state = whole.state_dict(keep_vars=True)
            saved = get_peft_model_state_dict(whole, state_dict=state, save_embedding_layers=False)
    except ValueError as error:
        raise CheckpointError(f"{adapter}: does not fit the base model: {' '.join(str(error).split())}") from None
    called = next(iter(whole.peft_config))
    by_identity = {id(parameter): name for name, parameter in state.items()}
    places = {key: by_identity[id(parameter)].removeprefix(_PREFIX) for key, parameter in saved.items()}
    if missing := [key for key in saved if key not in stored]:
        raise CheckpointError(f"{adapter / WEIGHTS}: {adapters.lacks(missing)}")
    modules = dict(skeleton.named_modules())
    found: dict[str, Change] = {}
    parts: dict[str, dict[str, StoredTensor]] = {}  # of each adapted module, by their names inside it
    unknown = []
    for key, tensor in stored.items():
        place = places.get(key, key.removeprefix(_PREFIX))
        if (parameter := state.get(_PREFIX + place)) is None:
            unknown.append(key)
            continue
        if tensor.shape != (wanted := tuple(parameter.shape)):
            raise CheckpointError(
                f"{tensor.path}: {key} has shape {list(tensor.shape)}, but for this base model it would have {list(wanted)}; "
                "is it the base model that the adapter was trained on?"
            )
        plain = place.replace(".base_layer.", ".").replace(f".modules_to_save.{called}.", ".")
        if plain in own:
            found[plain] = _replaced(tensor)
        else:
            module = next(m for m in _parents(place) if isinstance(modules.get(m), BaseTunerLayer))
            parts.setdefault(module, {})[place.removeprefix(f"{module}.")] = tensor
    if unknown:
        raise CheckpointError(f"{adapter / WEIGHTS}: the base model has no place for {listed(unknown)}")
    for module, tensors in parts.items():
        name = f"{module}.weight"
        if name not in own:
            kind = type(modules[module].get_base_layer()).__name__
            raise CheckpointError(
                f"{adapter}: is for {module}, a {kind}, and such an adapter cannot be merged in files"
            )
        found[name] = _merged(module, modules[module], tensors, found.get(name))
    return found


def _replaced(tensor: StoredTensor) -> Change:
    return lambda _: tensor.read()


def _merged(name: str, module: Any, tensors: Mapping[str, StoredTensor], before: Change | None) -> Change:
    """``before`` gives the weight that the adapter's own file has for the base, if it has one."""

    def change(weight: Tensor) -> Tensor:
        empty = module.state_dict()
        values = {key: tensor.read() for key, tensor in tensors.items()}
        with torch.no_grad():
            values["base_layer.weight"] = before(weight) if before else weight
            module.load_state_dict(values, strict=False, assign=True)
            try:
                module.merge(safe_merge=True)
                merged: Tensor = module.get_base_layer().weight.detach()
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from None
            finally:
                module.merged_adapters.clear()
                module.load_state_dict(empty, strict=False, assign=True)
        return merged

    return change


def _parents(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[:count]) for count in range(len(words) - 1, 0, -1)]
