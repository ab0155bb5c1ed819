"""Groups of ranks that share layers or sequences, and outcomes on which their members agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed.runtime.sequence_parallel.parallel_state_sp as sequence_state
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lisa_ds.engines.zero3 import parallel
from tests.zero3 import trajectory
from tests.zero3.trajectory import MICRO_BATCH, SEQUENCE, Outcome


@contextlib.contextmanager
def fresh_groups() -> Iterator[None]:
    """DeepSpeed keeps groups of ranks for the life of a process; each run here begins as a process would."""
    try:
        yield
    finally:
        groups.mpu = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def finish(engine: Any, outcome: Outcome) -> Outcome:
    """What there is to be told of the ranks' parts."""
    units = trajectory.units(engine.module)
    parameters = dict(engine.module.named_parameters())
    outcome.extra["shape"] = engine.model_shape
    outcome.extra["ranks"] = parallel.data_parallel_size(engine)
    outcome.extra["parts"] = [
        (units[name], p.ds_numel, dist.get_world_size(p.ds_process_group)) for name, p in parameters.items()
    ]
    if engine.mp_world_size > 1:
        outcome.extra["apart"] = [name for name, p in parameters.items() if not _same_on_peers(p, engine)]
    return outcome


def _same_on_peers(parameter: Any, engine: Any) -> bool:
    """Whether the ranks that share layers hold the same bits of a parameter that is not shared itself."""
    group = engine.mpu.get_model_parallel_group()
    spans = dist.get_world_size(parameter.ds_process_group) == dist.get_world_size()  # partitioned over the peers, too
    if is_model_parallel_parameter(parameter) or spans:
        return True
    mine = parameter.ds_tensor.detach().view(torch.uint8)[: parameter.ds_tensor.ds_numel * parameter.element_size()]
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, mine.contiguous(), group=group)
    return all(torch.equal(mine, other) for other in others)


class _Gather(torch.autograd.Function):
    """Each rank's value, on every rank; torch's own works on global ranks only where it runs on CPU."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        values = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(values, value.contiguous(), group=group)
        return torch.stack(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def sequence_loss(engine: Any, batch: Tensor) -> Tensor:
    """The mean over the tokens of whole sequences, of which this rank has a part: as transformers weighs it."""
    group = sequence_state.get_sequence_parallel_group()
    size, mine = dist.get_world_size(group), dist.get_rank(group)
    first = dist.get_rank() // size * MICRO_BATCH
    rows = batch[first : first + MICRO_BATCH]
    labels = torch.nn.functional.pad(rows, (0, 1), value=-100)[:, 1:]
    positions = torch.arange(SEQUENCE).expand_as(rows)
    part = slice(mine * SEQUENCE // size, (mine + 1) * SEQUENCE // size)
    rows, labels, positions = (tensor[:, part].contiguous() for tensor in (rows, labels, positions))
    loss = engine(input_ids=rows, labels=rows, shift_labels=labels, position_ids=positions).loss
    tokens = _Gather.apply((labels != -100).sum().float(), group)
    result: Tensor = (_Gather.apply(loss, group) * tokens).sum() / tokens.sum()
    return result


@contextlib.contextmanager
def shared_sequences(model: Any) -> Iterator[Any]:
    """DeepSpeed's Ulysses for ``model``, by two ranks for each sequence."""
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model.config._attn_implementation = "sdpa"
    with fresh_groups():
        try:
            yield UlyssesSPAttentionHF.register_with_transformers(
                model, "sdpa", sequence_parallel_size=2, micro_batch_size=MICRO_BATCH
            )
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = stock
            sequence_state._release_sequence_parallel_groups()
