"""LISA fine-tuning under DeepSpeed ZeRO-3: optimizer state for the sampled layers only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lisa_ds.config import LisaConfig as LisaConfig
    from lisa_ds.config import RunConfig as RunConfig
    from lisa_ds.config import load_config as load_config
    from lisa_ds.engines.zero3 import initialize as initialize
    from lisa_ds.errors import LisaError as LisaError
    from lisa_ds.integrations.hf import attach as attach
    from lisa_ds.layers import LayerStack as LayerStack
    from lisa_ds.memory import ModelShape as ModelShape
    from lisa_ds.memory import Plan as Plan
    from lisa_ds.memory import Precision as Precision
    from lisa_ds.memory import plan as plan
    from lisa_ds.models.adapters import add_adapters as add_adapters
    from lisa_ds.ops import masked_adamw_ as masked_adamw_
    from lisa_ds.optim import MaskedAdamW as MaskedAdamW
    from lisa_ds.sampling import LayerSampler as LayerSampler

__version__ = "0.1.0.dev0"

# Imported on first use: `import lisa_ds` on a login node loads neither torch nor DeepSpeed.
_HOME = {
    "LayerSampler": "sampling",
    "LayerStack": "layers",
    "LisaConfig": "config",
    "LisaError": "errors",
    "MaskedAdamW": "optim",
    "ModelShape": "memory",
    "Plan": "memory",
    "Precision": "memory",
    "RunConfig": "config",
    "add_adapters": "models.adapters",
    "attach": "integrations.hf",
    "initialize": "engines.zero3",
    "load_config": "config",
    "masked_adamw_": "ops",
    "plan": "memory",
}
__all__ = [
    "LayerSampler",
    "LayerStack",
    "LisaConfig",
    "LisaError",
    "MaskedAdamW",
    "ModelShape",
    "Plan",
    "Precision",
    "RunConfig",
    "add_adapters",
    "attach",
    "initialize",
    "load_config",
    "masked_adamw_",
    "plan",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'lisa_ds' has no attribute {name!r}")
    return getattr(import_module(f"lisa_ds.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
