"""Bytes of live model state of a trainer, by any method, and what full fine-tuning would keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from lisa_ds.engines.common.storage import storage_bytes
from lisa_ds.engines.zero2.memory_report import StepWatch, is_zero2
from lisa_ds.engines.zero3 import parallel
from lisa_ds.engines.zero3.watch.memory_report import memory_report, precision
from lisa_ds.layers import LayerStack
from lisa_ds.memory import KINDS, ModelShape, Precision, full_state_bytes


class LiveState(TrainerCallback):
    """Counts model state on this rank, with the keys of ``engine.memory_report()``.

    Under ZeRO-3 all of it can be counted at any time. Under ZeRO-2 and without DeepSpeed gradients are there at a step
    only: the most of the first one is told.

    Args:
        trainer: One that has not trained yet.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._watch: StepWatch | None = None
        self._alive: list[Tensor] = []  # parameters that have a gradient
        self._gradients = 0
        # Before those hooks that step in backward and let go of gradients.
        trained = () if trainer.is_deepspeed_enabled else [p for p in trainer.model.parameters() if p.requires_grad]
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._count_gradients) for parameter in trained]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the steps of what does not keep its gradients."""
        engine = self._trainer.deepspeed
        if engine is not None and is_zero2(engine.optimizer):
            self._watch = StepWatch(engine.optimizer, engine.module.parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting: all steps have the same gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._alive = [], []

    def bytes(self) -> dict[str, int]:
        """Bytes by kind; those of ``exp_avg`` include GaLore's projectors."""
        engine = self._trainer.deepspeed
        if self._watch is not None:
            return self._watch.bytes()
        if engine is not None:
            return memory_report(engine.optimizer, engine.module.parameters())
        states = self._trainer.optimizer.state.values()
        return dict.fromkeys(KINDS, 0) | {
            "weights": storage_bytes(self._trainer.model.parameters()),
            "gradients": self._gradients,
            "exp_avg": storage_bytes(_moments(states, "exp_avg", "state1", "absmax1", "projector")),
            "exp_avg_sq": storage_bytes(_moments(states, "exp_avg_sq", "state2", "absmax2")),
            "buckets": _buckets(self._trainer.model_wrapped),
        }

    def _count_gradients(self, last: Tensor) -> None:
        self._alive = [parameter for parameter in self._alive if parameter.grad is not None] + [last]
        self._gradients = max(self._gradients, storage_bytes(parameter.grad for parameter in self._alive))


def _moments(states: Any, *keys: str) -> Iterator[Tensor]:
    for state in states:
        for key in (*keys, f"{keys[0]}_scale"):
            value = state.get(key)
            value = getattr(value, "ortho_matrix", value)
            yield from value if isinstance(value, list) else [value] if torch.is_tensor(value) else ()


def _buckets(model: Any) -> int:
    """Bytes of DDP's buckets, in which it keeps a copy of all gradients."""
    if not isinstance(model, DistributedDataParallel):
        return 0
    told: dict[str, Any] = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    sizes = told.get("rebuilt_bucket_sizes") or told["bucket_sizes"]
    return sum(map(int, str(sizes).split(",")))


def full_state(trainer: Any, shape: ModelShape, layers_path: str = "auto") -> dict[str, int]:
    """Bytes that full fine-tuning under ZeRO-3 would keep alive on this rank, by the planner, in the run's precision.

    Args:
        trainer: After training.
        shape: Of the model that was loaded, without adapters.
        layers_path: As in the LISA section.
    """
    engine, args = trainer.deepspeed, trainer.args
    if engine is None:
        width = next(trainer.model.parameters()).element_size()
        return full_state_bytes(shape, world_size=args.world_size, precision=Precision(width, width))
    ranks = parallel.data_parallel_size(engine)
    if ranks != args.world_size:  # ranks that share layers hold a part of each
        shape = parallel.model_shape(LayerStack.from_model(trainer.model, layers_path), ranks, frozen=False)
    return full_state_bytes(shape, world_size=ranks, precision=precision(engine))
