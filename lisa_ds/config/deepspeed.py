"""What several rooms read of a DeepSpeed config, and the types of gradients that follow from it.

Here and without DeepSpeed: the planner, a run's preflight and the engine have to read it alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lisa_ds.config.base import show
from lisa_ds.errors import ConfigError

# DeepSpeed's names of the types that gradients may be added up in (its DtypeEnum) -> bytes of an element.
_BYTES = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), 4),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16"), 2),
}


def section(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of a DeepSpeed config; empty where it is missing or no section."""
    found = fields.get(key)
    return found if isinstance(found, Mapping) else {}


def autotp_size(fields: Mapping[str, Any], source: str = "deepspeed config", *, num_ranks: int | None = None) -> int:
    """Ranks that share each layer by AutoTP, as a DeepSpeed config says; 1 where it says nothing, or DeepSpeed's 0 for off.

    Args:
        fields: The config's own keys.
        source: How messages call it.
        num_ranks: All ranks, where their number is known.

    Raises:
        ConfigError: It is no number of ranks, or does not divide them.

    Example:
        >>> autotp_size({"tensor_parallel": {"autotp_size": 2}}, num_ranks=8)
        2
    """
    size = section(fields, "tensor_parallel").get("autotp_size", 0)
    wrong = isinstance(size, bool) or not isinstance(size, int) or size < 0
    ways = 1 if wrong else max(1, size)
    if wrong or (num_ranks or 0) % ways:
        on = f" of this run's {num_ranks} ranks" if num_ranks else ""
        raise ConfigError(
            f"{source}: tensor_parallel.autotp_size: so many{on} share each layer, got {show(size)}; choose a number that "
            "divides them, or leave it out"
        )
    return ways


def asked_gradient_bytes(fields: Mapping[str, Any], source: str = "deepspeed config") -> int | None:
    """Bytes of the type that ``data_types.grad_accum_dtype`` asks for; None where it asks for none.

    Raises:
        ConfigError: DeepSpeed knows no such type.
    """
    asked = section(fields, "data_types").get("grad_accum_dtype")
    if asked is None:
        return None
    if not isinstance(asked, str) or asked not in _BYTES:
        raise ConfigError(
            f"{source}: data_types.grad_accum_dtype: should be one of fp32, bf16, fp16, got {show(asked)}; leave it out for "
            "fp32 where gradients are accumulated"
        )
    return _BYTES[asked]


def accumulates_in_fp32(asked: object, *, accumulates: bool) -> bool:
    """Whether LISA adds gradients up in fp32 of its own accord: when there is more than one to add, and no type is asked for.

    DeepSpeed by itself adds 16-bit gradients of micro-batches in 16 bits.

    Args:
        asked: ``data_types.grad_accum_dtype``, or its bytes; None where there is none.
        accumulates: Whether a step may have more than one micro-batch.
    """
    return asked is None and accumulates


def gradient_bytes(asked: int | None, weight_bytes: int, *, accumulates: bool, lisa: bool) -> int:
    """Bytes of an element of the gradient that waits for the step.

    Args:
        asked: From :func:`asked_gradient_bytes`.
        weight_bytes: Of the weights, whose type it is by default.
        accumulates: Whether a step may have more than one micro-batch.
        lisa: Whether LISA's engine trains, not DeepSpeed's own.

    Example:
        >>> gradient_bytes(None, 2, accumulates=True, lisa=True), gradient_bytes(None, 2, accumulates=True, lisa=False)
        (4, 2)
    """
    if lisa and accumulates_in_fp32(asked, accumulates=accumulates):
        return 4
    return weight_bytes if asked is None else asked
