"""Tensor and sequence parallelism beside ZeRO-3's data parallelism: checks, group sizes, collectives.

Note on which rank holds what.
    Under tensor parallelism a rank holds a part of most layers, and ZeRO-3 partitions that part over the *data-parallel*
    ranks, those that hold the same part. What is not split (norms, mostly) is replicated on all tensor-parallel ranks,
    and the copies stay equal only if they are updated equally. A model built under ``deepspeed.zero.Init`` has those
    copies partitioned over all ranks, as they were before the layers were split.
    Under sequence parallelism every rank holds everything, and ZeRO-3 partitions it over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import is_model_parallel_parameter

from lisa_ds.config.deepspeed import autotp_size, section
from lisa_ds.engines.common.protocol import Collectives
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack
from lisa_ds.memory import ModelShape

_MEGATRON = "for experts or pipeline stages of their own on each rank use the Megatron engine"


def problems(fields: Mapping[str, Any]) -> list[str]:
    """Parallelism options of a DeepSpeed config that cannot be combined with LISA: key, value and remedy of each.

    Args:
        fields: The config's own keys; values may still be ``auto``.

    Raises:
        ConfigError: ``tensor_parallel.autotp_size`` is no number of ranks.
    """
    found = []
    if section(fields, "expert_parallel").get("enabled"):
        found.append(
            f"expert_parallel.enabled: AutoEP keeps experts in groups of ranks of their own; set it to false, or {_MEGATRON}"
        )
    if "sequence_parallel_size" in fields and "data_parallel_size" in fields:
        found.append(f"sequence_parallel_size, data_parallel_size: {_MESH}")
    hpz = section(fields, "zero_optimization").get("zero_hpz_partition_size", 1)
    if autotp_size(fields) > 1 and isinstance(hpz, int) and hpz > 1:
        found.append(_hpz_problem(hpz, f"tensor_parallel.autotp_size {autotp_size(fields)}"))
    return found


def check(engine: Any) -> None:
    """Refuse process groups of a partly built engine under which gradients would be wrong.

    Raises:
        EngineError: Names the option and the remedy.
    """
    zero = engine._config.zero_config
    hpz = int(zero.zero_hpz_partition_size)
    if hpz > 1 and engine.mp_world_size > 1:
        raise EngineError(f"deepspeed config: {_hpz_problem(hpz, f'layers shared by {engine.mp_world_size} ranks')}")
    if engine.autotp_size() > 1:
        _check_autotp(engine)
    if engine.sequence_parallel_size <= 1:
        return
    if engine.autotp_size() > 1:
        raise EngineError(
            f"deepspeed config: tensor_parallel.autotp_size: does not go with sequence parallelism, got "
            f"{engine.autotp_size()}; remove it, or split the layers of the sequence's ranks no further"
        )
    if not hasattr(engine.mpu, "get_sequence_data_parallel_group"):
        raise EngineError(f"mesh_param, or sequence_parallel_size and data_parallel_size: {_MESH}")
    if not zero.reduce_scatter:
        raise EngineError(
            f"deepspeed config: zero_optimization.reduce_scatter: with sequences shared by {engine.sequence_parallel_size} "
            "ranks DeepSpeed adds their gradients up here but takes the mean where it is true; got False, set it to true"
        )


def _check_autotp(engine: Any) -> None:
    size, key = engine.autotp_size(), "deepspeed config: tensor_parallel.autotp_size"
    if engine.mp_world_size != size:
        raise EngineError(
            f"{key}: got {size}, but DeepSpeed keeps the groups of this process's first engine, in which {engine.mp_world_size} "
            "ranks share each layer; use that number, or a new process"
        )
    empty = any(getattr(parameter, "ds_numel", parameter.numel()) == 0 for parameter in engine.module.parameters())
    anywhere = torch.tensor(float(empty), device=engine.device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere > 0:
        raise EngineError(
            f"{key}: got {size}, which leaves a rank without any part of some layer (attention is split by its key-value "
            "heads), and ZeRO-3 cannot gather nothing; choose at most the number of key-value heads"
        )


def data_parallel_size(engine: Any) -> int:
    """Ranks that ZeRO-3 partitions over."""
    return int(dist.get_world_size(engine.seq_data_parallel_group))


def collectives(device: torch.device) -> Collectives:
    """Collectives over all ranks of the process group, with tensors on ``device``."""
    return Collectives(
        add=dist.all_reduce,
        maximum=lambda tensor: dist.all_reduce(tensor, op=dist.ReduceOp.MAX),
        texts=_texts,
        device=device,
    )


def _texts(own: str) -> list[str]:
    texts: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(texts, own)
    return texts


def stream_rank(parameter: Any) -> int:
    """Number of this rank's random stream for ``parameter``, equal on ranks that hold copies of the same partition.

    Stochastic rounding must round the copies equally.
    """
    own = is_model_parallel_parameter(parameter)
    return int(dist.get_rank() if own else dist.get_rank(parameter.ds_process_group))


def model_shape(stack: LayerStack, world_size: int, *, frozen: bool) -> ModelShape:
    """Elements of each parameter by unit, such that ``ceil(numel / world_size)`` of them are on this rank.

    Args:
        stack: The model, partitioned.
        world_size: Ranks that ZeRO-3 partitions over.
        frozen: Whether parameters that never train are told apart from those that do.
    """

    def numels(*, trainable: bool | None) -> dict[Any, tuple[int, ...]]:
        whole = stack.numels(trainable=trainable)
        for unit, sizes in whole.items():
            parameters = [p for p in stack.parameters(unit) if trainable in (None, p.requires_grad)]
            whole[unit] = tuple(_share(p, size, world_size) for p, size in zip(parameters, sizes, strict=True))
        return whole

    of_blocks = len(stack.layers) if stack.by_matrices else None
    if not frozen:
        return ModelShape.from_numels(numels(trainable=None), tied=stack.tied, of_blocks=of_blocks)
    apart = [numel for unit in numels(trainable=False).values() for numel in unit]
    return ModelShape.from_numels(numels(trainable=True), tied=stack.tied, frozen=apart, of_blocks=of_blocks)


def _share(parameter: Any, numel: int, world_size: int) -> int:
    group = getattr(parameter, "ds_process_group", None)
    if group is None or dist.get_world_size(group) == world_size:
        return numel
    return -(-numel // int(dist.get_world_size(group))) * world_size  # partitioned over others: see zero.Init above


def _hpz_problem(size: int, beside: str) -> str:
    return (
        f"zero_optimization.zero_hpz_partition_size: keeps second copies within consecutive ranks, which with {beside} hold "
        f"different layers, got {size}; set it to 1"
    )


_MESH = (
    "DeepSpeed's mesh reduces gradients over the data-parallel ranks alone, so that ranks with one sequence would drift "
    "apart; pass mpu=UlyssesSPAttentionHF.register_with_transformers(...) instead"
)
