"""The ``training`` section, read without transformers: types, limits, and names that transformers has dropped."""

from __future__ import annotations

import ast
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from lisa_ds.config.base import Section, fits_a_path, mistake

EARLY_STOPPING: dict[str, tuple[type, str]] = {
    "early_stopping_patience": (int, "Evaluations without a better eval_loss after which training stops."),
    "early_stopping_threshold": (float, "How much better it has to be."),
}
"""Keys of ``training`` that are ours: transformers has them in a callback only."""

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Values of ``optim`` that mean torch's AdamW; the default is one of them."""

WITHOUT_BETAS = ("sgd", "adagrad", "rmsprop", "adafactor")
"""Values of ``optim`` whose optimizers do not read ``adam_beta1`` and the like."""

FORMER = {
    "adafactor": "set optim: adafactor",
    "dispatch_batches": "set accelerator_config: {dispatch_batches: ...}",
    "evaluation_strategy": "its name is eval_strategy now",
    "fp16_backend": "DeepSpeed computes in fp16: set fp16 alone",
    "fp16_opt_level": "DeepSpeed computes in fp16: set fp16 alone",
    "fsdp_min_num_params": "LISA shards its state under DeepSpeed ZeRO-3",
    "fsdp_transformer_layer_cls_to_wrap": "LISA shards its state under DeepSpeed ZeRO-3",
    "group_by_length": "set train_sampling_strategy: group_by_length",
    "half_precision_backend": "DeepSpeed computes in fp16: set fp16 alone",
    "include_inputs_for_metrics": "set include_for_metrics: [inputs]",
    "include_tokens_per_second": "every log entry has tokens_per_second",
    "jit_mode_eval": "set torch_compile for compiled models",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "mp_parameters": "a run is not for SageMaker's model parallelism",
    "no_cuda": "set use_cpu: true",
    "overwrite_output_dir": "a run overwrites no other: choose another output_dir, or go on with --resume auto",
    "past_index": "models that return their past are not trained with it",
    "per_gpu_eval_batch_size": "its name is per_device_eval_batch_size now",
    "per_gpu_train_batch_size": "its name is per_device_train_batch_size now",
    "push_to_hub_model_id": "its name is hub_model_id now",
    "push_to_hub_organization": "set hub_model_id: organization/name",
    "push_to_hub_token": "its name is hub_token now",
    "ray_scope": "a run does not search hyperparameters",
    "save_safetensors": "weights are always saved as safetensors",
    "sharded_ddp": "LISA shards its state under DeepSpeed ZeRO-3",
    "split_batches": "set accelerator_config: {split_batches: ...}",
    "torchdynamo": "set torch_compile_backend",
    "tpu_metrics_debug": "set debug: tpu_metrics_debug",
    "tpu_num_cores": "a run is for GPUs and CPUs",
    "use_legacy_prediction_loop": "there is one loop for evaluation",
    "use_mps_device": "a run is for GPUs and CPUs",
    "warmup_ratio": "set warmup_steps below 1: a share of all steps",
    "xpu_backend": "its name is ddp_backend now",
    # Transformers 5 has had these under two names, of which a release knows one.
    "train_sampling_strategy": "its name is group_by_length: true",
    "activation_checkpointing": "its name is gradient_checkpointing",
    "activation_checkpointing_kwargs": "its name is gradient_checkpointing_kwargs",
}
"""Arguments of transformers that not every release of the supported range has any more, or yet, and what to write instead."""

_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, 2**31 - 1)),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit"), (1, 2**31 - 1)),
    **dict.fromkeys(("early_stopping_patience", "eval_accumulation_steps", "torch_empty_cache_steps"), (1, 2**31 - 1)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon"), (0, 1e9)),
    **dict.fromkeys(("early_stopping_threshold", "neftune_noise_alpha", "eval_delay", "warmup_steps"), (0, 2**53)),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), (0, 2**53)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1 - 2**-53)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "max_steps": (-1, 2**53),
    "num_train_epochs": (0, 1e6),
    "label_smoothing_factor": (0, 1),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 2**31 - 1),
    "ddp_timeout": (1, 10**9),
}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "keys and values"}


@dataclass(frozen=True)
class TrainingValues:
    """The keys that decide where a run writes and what memory it takes; the defaults are transformers'."""

    output_dir: str | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool | None = None
    activation_checkpointing: bool | None = None
    use_liger_kernel: bool = False
    liger_kernel_config: dict[str, bool] | None = None

    @property
    def checkpointing(self) -> bool:
        """Whether activation checkpointing is on (recompute in backward), under either of transformers' names."""
        return bool(self.gradient_checkpointing or self.activation_checkpointing)

    @property
    def fused_loss(self) -> bool:
        """Whether Liger computes head and loss together, so that the logits never exist as a whole."""
        return self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)


def section(hints: Mapping[str, Any], elsewhere: Mapping[str, str] | None = None) -> type[Section]:
    """``training`` as a section of this package, so that its mistakes read like all others.

    Args:
        hints: Type of each key that exists; ``Any`` for one that is not checked.
        elsewhere: Keys that are refused, each with what does the same instead.
    """
    refused = {name: f"does not belong here: {why}" for name, why in (elsewhere or {}).items()}
    gone = {name: f"the installed transformers has no such argument; {write}" for name, write in FORMER.items()}
    fields: dict[str, Any] = {
        name: (Annotated[Any, BeforeValidator(functools.partial(_check, name, hint))], None)
        for name, hint in {**hints, **{name: kind for name, (kind, _) in EARLY_STOPPING.items()}}.items()
    }
    for name, why in {**gone, **refused}.items():
        # Excluded: it is not one of the keys that there are, and never meant by a misspelt one.
        refuses = Annotated[Any, BeforeValidator(functools.partial(_refuse, why)), Field(exclude=True)]
        fields.setdefault(name, (refuses, None))
    return create_model("Training", __base__=Section, **fields)


@functools.cache
def known() -> type[Section] | None:
    """The section with the keys of the installed transformers, of which :class:`TrainingValues` names the types.

    Its source is read, not imported, which would take torch and seconds. None where it is not installed.
    """
    found = find_spec("transformers")
    places = [Path(folder) / "training_args.py" for folder in (found and found.submodule_search_locations) or ()]
    source = next((place for place in places if place.is_file()), None)
    if source is None:
        return None
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"]
    names = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    read = typing.get_type_hints(TrainingValues)
    return section({name: read.get(name, Any) for name in names if not name.startswith("_")})


def _check(name: str, hint: Any, value: Any) -> Any:
    """Check ``value`` against the type that transformers declares, and limits that it does not declare."""
    if hint is Any:
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    choices = [choice.value for option in options if _is_enum(option) for choice in option]
    if choices:
        if value is False and "no" in choices:  # what YAML makes of a bare `no`
            value = "no"
        if value not in choices:
            expected = ", ".join(f"'{choice}'" for choice in choices)
            raise PydanticCustomError("literal_error", "should be one of {expected}", {"expected": expected})
    elif not any(_fits(option, value) for option in options):
        raise mistake(f"should be {' or '.join(dict.fromkeys(map(_name, options)))}")
    elif name == "output_dir" and value:
        return fits_a_path(value)
    elif name in _LIMITS and value is not None:
        least, most = _LIMITS[name]
        if not least <= value <= most:  # nor is it "not a number"
            raise mistake(f"should be {least} or more" if value < least else f"should be {_below(most)}")
    return value


def _below(most: float) -> str:
    return "less than 1" if most == 1 - 2**-53 else f"{most:.15g} or less"


def _refuse(why: str, value: Any) -> Any:
    raise mistake(why)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _fits(hint: Any, value: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    if kind is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint))
    if _is_enum(hint):
        return value in [choice.value for choice in hint]
    if isinstance(value, bool):  # Python takes it for a number
        return kind in (bool, Any)
    if kind is float:
        return isinstance(value, (int, float))
    if kind is list:
        (inner,) = typing.get_args(hint) or (Any,)
        return isinstance(value, list) and all(_fits(inner, each) for each in value)
    if kind is dict:
        inner = (typing.get_args(hint) or (Any, Any))[1]
        return isinstance(value, dict) and all(isinstance(key, str) and _fits(inner, v) for key, v in value.items())
    return kind is Any or (isinstance(kind, type) and isinstance(value, kind))


def _name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    if kind is list:
        return "a list" + (" of text" if typing.get_args(hint) == (str,) else "")
    if kind is typing.Literal:
        return " or ".join(str(choice).lower() for choice in typing.get_args(hint))
    return "nothing" if kind is type(None) else _NAMES.get(kind, str(kind))
