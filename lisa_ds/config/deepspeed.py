"""Reads the keys of a DeepSpeed config that several packages need, and works out the gradients' type from them.

It does not import DeepSpeed: the planner, a run's preflight and the engine must all read the config alike.
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
    """A section of a DeepSpeed config; empty if it is missing or not a section."""
    found = fields.get(key)
    return found if isinstance(found, Mapping) else {}


def autotp_size(fields: Mapping[str, Any], source: str = "deepspeed config", *, num_ranks: int | None = None) -> int:
    """The tensor-parallel size (AutoTP) in a DeepSpeed config; 1 where it is missing, or 0, which is DeepSpeed's off.

    Args:
        fields: The config's own keys.
        source: What messages call the config.
        num_ranks: The number of all ranks, if it is known.

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
        ConfigError: DeepSpeed has no such type.
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
    """Whether LISA accumulates gradients in fp32 unasked: where a step has several micro-batches, and no type is set.

    DeepSpeed by itself accumulates 16-bit gradients in 16 bits.

    Args:
        asked: ``data_types.grad_accum_dtype``, or its bytes; None where there is none.
        accumulates: Whether a step may have more than one micro-batch.
    """
    return asked is None and accumulates


def gradient_bytes(asked: int | None, weight_bytes: int, *, accumulates: bool, lisa: bool) -> int:
    """Bytes per element of the accumulated gradient, which the optimizer step reads.

    Args:
        asked: From :func:`asked_gradient_bytes`.
        weight_bytes: Bytes per element of the weights; gradients have their type by default.
        accumulates: Whether a step may have more than one micro-batch.
        lisa: Whether LISA's engine trains, not DeepSpeed's own.

    Example:
        >>> gradient_bytes(None, 2, accumulates=True, lisa=True), gradient_bytes(None, 2, accumulates=True, lisa=False)
        (4, 2)
    """
    if lisa and accumulates_in_fp32(asked, accumulates=accumulates):
        return 4
    return weight_bytes if asked is None else asked
