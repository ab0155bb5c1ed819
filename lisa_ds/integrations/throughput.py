"""Logs a run's speed: tokens per second, MFU and HFU, memory; over all ranks, since the entry before.

Each rank counts by itself; ranks communicate only when an entry is logged: one gather of a few numbers.
"""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lisa_ds.flops import ComputeShape, Cost, Trained, cost
from lisa_ds.integrations.clock import Clock
from lisa_ds.integrations.sharing import tensor_parallel_size
from lisa_ds.layers import LayerStack

UNITS = {
    "tokens_per_second": "1/s",
    "tokens_per_second_per_gpu": "1/s",
    "mfu": "",
    "hfu": "",
    "waiting_for_data": "",
    "evaluating_and_saving_s": "s",
    "max_rank_memory_gb": "GB",
    "max_rank_reserved_gb": "GB",
}
"""The keys of a log entry, each with its unit. Tokens do not count padding, and a rank without a GPU counts as one.

Rates are over all the time since the entry before, except that of evaluations and checkpoints, which has its own
key."""


class Throughput(TrainerCallback):
    """Adds the keys of :data:`UNITS` to the entries of training steps.

    ``mfu`` and ``hfu`` are missing where the device's peak or the model's FLOPs are not known, or ranks share layers.

    Args:
        trainer: A :class:`~lisa_ds.integrations.trainer.LabelLogitsTrainer`. This goes before its other callbacks, so that
            trackers see what is added.
        clock: Of the same trainer.
        peak_flops: Of the device of one rank, FLOP/s; None if it is not known.
        layers_path: As in the LISA section.
    """

    def __init__(self, trainer: Any, clock: Clock, peak_flops: float | None, layers_path: str = "auto") -> None:
        self._trainer = trainer
        self._clock = clock
        self._sharing = tensor_parallel_size(trainer.args)  # ranks that compute one layer, and so the same tokens
        # Of a layer's arithmetic a rank has a part then, which the model's config does not tell.
        self._peak = peak_flops if self._sharing == 1 else None
        self._layers_path = layers_path
        self._stack: LayerStack | None = None
        self._shape: ComputeShape | None = None
        self._cost: Cost | None = None
        self._sampled: Any = None  # by which self._cost was made
        self._settled = torch.zeros(5, dtype=torch.float64)  # of the trainer's counts, what is in self._flops
        self._flops: Tensor | float = 0.0  # of the model, of the hardware
        self._logged: Tensor | float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the model's layers, now that the engine exists."""
        if self._peak is not None:
            self._stack = LayerStack.from_model(self._trainer.model, self._layers_path)
            self._shape = compute_shape(self._trainer.model, self._stack)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note which layers this step trains."""
        engine = self._trainer.deepspeed
        sampled = (getattr(engine, "sampled_layers", ()), getattr(engine, "sampled_roles", ()))
        if self._shape is None or self._stack is None or (self._cost is not None and sampled == self._sampled):
            return
        self._settle()
        self._sampled = sampled
        self._cost = cost(self._shape, trained(self._trainer.model, self._stack))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Add what happened since the last entry."""
        if "loss" not in logs:
            return
        now = self._gathered()
        rates = self._rates(now - self._logged, now)
        self._logged = now
        logs.update(rates)
        state.log_history[-1].update(rates)  # Trainer has copied the entry already

    def total(self) -> dict[str, float]:
        """The same over the whole run since its start or resume; every rank calls it."""
        now = self._gathered()
        return self._rates(now, now)

    def _settle(self) -> None:
        """Turn the counts since the last call into FLOPs, for the layers that trained in that time."""
        counted: Tensor = self._trainer.work.counts
        if self._cost is not None:
            tokens, pairs, logits, positions, position_pairs = (counted - self._settled.to(counted.device)).unbind()
            recomputes = self._trainer.args.gradient_checkpointing
            model = self._cost.model(tokens, pairs, logits)  # type: ignore[arg-type]
            hardware = self._cost.hardware(positions, position_pairs, logits, recomputes=recomputes)  # type: ignore[arg-type]
            self._flops = self._flops + torch.stack([torch.as_tensor(model), torch.as_tensor(hardware)])
        self._settled = counted

    def _gathered(self) -> Tensor:
        """``(ranks, 8)``, fp64.

        Tokens; FLOPs of the model and of the hardware; seconds of training, of waiting for data within it, and of what
        is not training; memory allocated and reserved, bytes.
        """
        self._settle()
        device = self._trainer.args.device
        row = torch.zeros(8, dtype=torch.float64, device=device)
        row[0] = torch.as_tensor(self._trainer.tokens)
        row[1:3] = self._flops
        row[3], row[4], row[5] = self._clock.training, self._clock.waiting, self._clock.apart
        row[6], row[7] = _memory()
        return self._trainer.accelerator.gather(row).reshape(-1, 8).cpu()

    def _rates(self, since: Tensor, now: Tensor) -> dict[str, float]:
        seconds, waiting, apart = since[:, 3:6].max(0).values.tolist()
        ranks = len(since)
        rates: dict[str, float] = {}
        tokens, model, hardware = since[:, :3].sum(0).tolist()
        if seconds > 0 and tokens:  # not so of a run that is resumed where nothing is left to train
            tokens /= self._sharing
            rates["tokens_per_second"] = round(tokens / seconds, 1)
            rates["tokens_per_second_per_gpu"] = round(tokens / seconds / ranks, 1)
            if self._peak is not None and model > 0:
                rates["mfu"] = round(model / seconds / ranks / self._peak, 4)
                rates["hfu"] = round(hardware / seconds / ranks / self._peak, 4)
            rates["waiting_for_data"] = round(waiting / seconds, 4)
        if apart >= 0.0005:
            rates["evaluating_and_saving_s"] = round(apart, 3)
        memory, reserved = now[:, 6:].max(0).values.tolist()
        rates["max_rank_memory_gb"] = round(memory / 1e9, 3)
        if reserved:
            rates["max_rank_reserved_gb"] = round(reserved / 1e9, 3)
        return rates


def compute_shape(model: Any, stack: LayerStack) -> ComputeShape | None:
    """The matrices of a transformers model; None for models that a ``ComputeShape`` does not describe.

    It does not describe encoder-decoders, where a token passes one half, mixtures of experts, where it passes few of
    them, and models whose config lacks the number of heads.
    """
    config = model.config.get_text_config()
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if getattr(config, "is_encoder_decoder", False) or any(getattr(config, name, None) for name in experts):
        return None
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    words = model.get_input_embeddings() if stack.tied else None
    head = words.parameters() if words is not None else iter(stack.lm_head)
    return ComputeShape(
        blocks=tuple(sum(_matrix(weight) for part in _parts(block) for weight in _own(part)) for block in stack.layers),
        attention=heads * int(getattr(config, "head_dim", None) or width // heads),
        head=sum(_matrix(weight) for weight in head),
    )


def trained(model: nn.Module, stack: LayerStack) -> Trained:
    """The parts of the model that require grad now."""
    below = {id(weight) for weight in stack.embeddings}
    for weight in model.parameters():  # a norm after the embeddings, say: modules are registered in the order they run
        if isinstance(stack.unit_of[id(weight)], int):
            break
        if stack.unit_of[id(weight)] == "rest":
            below.add(id(weight))
    weights = list(model.parameters())
    inside = [weight for part in _inside(stack) for weight in _own(part) if weight.requires_grad]
    head = stack.embeddings if stack.tied else stack.lm_head
    return Trained(
        blocks=frozenset(i for i in range(len(stack.layers)) if any(p.requires_grad for p in stack.parameters(i))),
        matrices=sum(map(_matrix, inside)),
        embeddings=any(weight.requires_grad for weight in weights if id(weight) in below),
        rest=any(weight.requires_grad for weight in stack.rest),
        head=any(weight.requires_grad for weight in head),
    )


def _inside(stack: LayerStack) -> Iterator[nn.Module]:
    return itertools.chain.from_iterable(map(_parts, stack.layers))


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block that multiply their input."""
    return (part for part in block.modules() if not isinstance(part, nn.Embedding))


def _own(part: nn.Module) -> list[nn.Parameter]:
    return list(part.parameters(recurse=False))


def _matrix(weight: nn.Parameter) -> int:
    """Elements of a matrix, whole also where ZeRO-3 has partitioned it; 0 for a vector."""
    shape: tuple[int, ...] = tuple(getattr(weight, "ds_shape", weight.shape))
    return torch.Size(shape).numel() if len(shape) > 1 else 0


def _memory() -> tuple[float, float]:
    """Peak memory of this rank in bytes: allocated on its GPU (and reserved there), or of its process on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
