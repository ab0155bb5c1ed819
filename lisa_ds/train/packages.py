"""Refuses values of ``training`` that need a missing package or do not work under ZeRO-3, before a model is loaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from transformers import integrations

from lisa_ds.config.base import Origin, show
from lisa_ds.errors import ConfigError

# Beginnings of transformers' names of optimizers -> the module that has them, and what is installed for it.
_OPTIMIZERS = {
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu": ("torch_npu", "torch-npu"),
    "adamw_torch_8bit": ("torchao", "torchao>=0.4"),
    "adamw_torch_4bit": ("torchao", "torchao>=0.4"),
    "adamw_apex": ("apex", "NVIDIA's apex, from its repository"),
    "adamw_anyprecision": ("torchdistx", "torchdistx, from its repository"),
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb", "paged_", "lion_", "ademamix", "rmsprop_bnb"),
        ("bitsandbytes", "bitsandbytes>=0.46.1"),
    ),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree>=1.4"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
# These look at whole matrices, or step while gradients are computed.
_NOT_SHARDED = ("galore_", "apollo_", "lomo", "adalomo")
LIGER_AT_LEAST = "0.3.0"


def check(given: Mapping[str, Any], origin: Origin, *, model_type: str | None = None) -> None:
    """Refuse what is not installed, or cannot work under ZeRO-3.

    Args:
        given: The ``training`` section.
        origin: Where it was read.
        model_type: The model's type, if it is known by now.

    Raises:
        ConfigError: Names the key, its value and what to install or to write.
    """
    _check_trackers(given.get("report_to"), origin)
    _check_optimizer(given, origin)
    if given.get("use_liger_kernel"):
        _check_liger(origin.where("use_liger_kernel"), model_type)
    if given.get("push_to_hub") and not given.get("hub_token"):
        from huggingface_hub import get_token

        if get_token() is None:
            raise ConfigError(
                f"{origin.where('push_to_hub')}: needs a token of the hub, got True; set HF_TOKEN, or hub_token"
            )
    if (backend := given.get("torch_compile_backend")) is not None:
        from torch import _dynamo  # seconds

        known = _dynamo.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigError(
                f"{origin.where('torch_compile_backend')}: should be one of {', '.join(known)}, got {show(backend)}"
            )
    if (mode := given.get("torch_compile_mode")) is not None:
        known = ["default", *torch._inductor.list_mode_options()]
        if mode not in known:
            raise ConfigError(
                f"{origin.where('torch_compile_mode')}: should be one of {', '.join(known)}, got {show(mode)}"
            )


def _check_trackers(report_to: str | list[str] | None, origin: Origin) -> None:
    asked = ({report_to} if isinstance(report_to, str) else set(report_to or ())) - {"all", "none"}
    if missing := sorted(name for name in asked if not _has_tracker(name)):
        present = integrations.get_available_reporting_integrations()
        raise ConfigError(
            f"{origin.where('report_to')}: {', '.join(missing)} is not installed or not known to transformers; "
            f"there is {', '.join(present) or 'none'}"
        )


def _has_tracker(name: str) -> bool:
    """Whether transformers knows a tracker and can import it; only this one is imported, as that takes seconds."""
    function = {"azure_ml": "azureml", "comet_ml": "comet"}.get(name, name)
    available = getattr(integrations, f"is_{function}_available", None)
    return available is not None and bool(available())


def _check_optimizer(given: Mapping[str, Any], origin: Origin) -> None:
    optim = given.get("optim")
    if not isinstance(optim, str):
        return
    where = origin.where("optim")
    if optim.startswith(_NOT_SHARDED):
        raise ConfigError(
            f"{where}: works on whole matrices, of which ZeRO-3 gives a rank a slice, got {show(optim)}; choose one that works on "
            f"elements, such as adamw_torch{', or method: galore' if optim.startswith('galore_') else ''}"
        )
    for beginning, (module, install) in _OPTIMIZERS.items():
        if optim.startswith(beginning) and find_spec(module) is None:
            raise ConfigError(
                f"{where}: needs {module}, which is not installed, got {show(optim)}; install {install}, or use adamw_torch"
            )


def _check_liger(where: str, model_type: str | None) -> None:
    if find_spec("liger_kernel") is None or Version(importlib.metadata.version("liger_kernel")) < Version(
        LIGER_AT_LEAST
    ):
        raise ConfigError(
            f"{where}: needs liger-kernel {LIGER_AT_LEAST} or newer, which is not installed, got True; pip install liger-kernel, or "
            "set it to false"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"{where}: Liger's kernels need a GPU, and this run has none, got True; set it to false")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type is not None and model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"{where}: Liger has no kernels for {model_type!r} models, got True; set it to false")
