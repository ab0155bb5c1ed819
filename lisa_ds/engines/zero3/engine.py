"""A DeepSpeed engine that trains the sampled blocks, and draws new ones after every interval."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3

from lisa_ds.config import LisaConfig
from lisa_ds.engines.zero3 import checkpoint, compat, policies
from lisa_ds.engines.zero3.frontier import BackwardFrontier
from lisa_ds.engines.zero3.linear import frozen_aware_linear
from lisa_ds.engines.zero3.live import memory_report
from lisa_ds.engines.zero3.window import WindowedStage3, WindowPlan
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack
from lisa_ds.sampling import LayerSampler

logger = logging.getLogger("lisa_ds")

_SMALLEST_BUCKET = 2**24
_STATE_KINDS = ("gradients", "master", "exp_avg", "exp_avg_sq")


class LisaEngine(DeepSpeedEngine):
    """``DeepSpeedEngine`` under LISA; built by :func:`lisa_ds.initialize` or by an armed trainer.

    Args:
        lisa: The run's LISA section.
        steps_per_epoch: Given this engine, the optimizer steps in one pass over the data, for ``interval_steps: 1epoch``;
            None where unknown.
        **kwargs: As ``deepspeed.initialize`` hands them to ``DeepSpeedEngine``.

    Raises:
        EngineError: DeepSpeed, or an option of its config, cannot be combined with LISA.
        ConfigError: The LISA section does not fit the model.
    """

    def __init__(
        self, *, lisa: LisaConfig, steps_per_epoch: Callable[[Any], int | None] = lambda engine: None, **kwargs: Any
    ) -> None:
        compat.check_deepspeed()
        compat.check_options(kwargs["config_class"])
        self._lisa = lisa
        self._steps_per_epoch = steps_per_epoch
        self._step_in_lisa = 0
        self._history: list[tuple[int, ...]] = []
        super().__init__(**kwargs)
        if not isinstance(self.optimizer, WindowedStage3):
            raise EngineError(
                f"the engine was built with {type(self.optimizer).__name__}, not with the windowed ZeRO-3 optimizer; "
                "pass an optimizer, or name one in the DeepSpeed config's 'optimizer' section"
            )
        self._frontier.move(self.sampled_layers)
        self._log_interval()

    # ---- public ---------------------------------------------------------------------------------------------------

    @property
    def sampled_layers(self) -> tuple[int, ...]:
        """Blocks that train now, ascending."""
        sampled: tuple[int, ...] = self.optimizer.sampled
        return sampled

    @property
    def interval(self) -> int:
        """Index of the current interval, from 0: applied optimizer steps // ``interval_steps``."""
        return self._sampler.interval_at(self._step_in_lisa)

    @property
    def layer_history(self) -> list[tuple[int, ...]]:
        """Every set of blocks so far, in order; the last one trains now."""
        return list(self._history)

    def memory_report(self) -> dict[str, int]:
        """Bytes of live model-state tensors on this rank; see :func:`lisa_ds.engines.zero3.live.memory_report`."""
        return memory_report(self.optimizer, self.module.parameters())

    def switch_to(self, layers: Iterable[int]) -> None:
        """Train exactly ``layers`` from the next forward on, until the next boundary of the schedule.

        For callers with their own schedule; set ``interval_steps`` beyond the run's length to have none of ours. Every rank
        must call it with the same layers, between ``step()`` and the next ``forward()``.

        Raises:
            EngineError: A layer does not exist, or gradients are being accumulated. Nothing has changed.
        """
        wanted = tuple(sorted({int(layer) for layer in layers}))
        count = len(self._stack.layers)
        if wanted and not 0 <= wanted[0] <= wanted[-1] < count:
            raise EngineError(f"switch_to: got layers {list(wanted)}, but the model has layers 0 to {count - 1}")
        if self.micro_steps % self.gradient_accumulation_steps():
            raise EngineError("switch_to: gradients are being accumulated and would be lost; call it after step()")
        self._switch(wanted)

    # ---- what DeepSpeed asks while it is built --------------------------------------------------------------------

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        # Here and not earlier: AutoTP replaces parameters before the optimizer is built.
        self._stack = LayerStack.from_model(self.module, self._lisa.layers_path)
        policies.apply(self._stack, self._lisa)
        compat.check_leaf_modules(self.module, self._stack)
        self._sampler = LayerSampler(
            num_layers=len(self._stack.layers),
            config=self._lisa,
            interval_steps=policies.interval_steps(self._lisa, self._steps_per_epoch(self)),
        )
        self._frontier = BackwardFrontier(self._stack)
        self._backward_may_stop = self._lisa.embeddings == "never"
        first = self._sampler.layers_at(0)
        self._history.append(first)
        plan = WindowPlan(
            unit_of=self._stack.unit_of, sampled=first, lr_scales=policies.lr_scales(self._stack, self._lisa)
        )
        saved = stage3.DeepSpeedZeroOptimizer_Stage3
        stage3.DeepSpeedZeroOptimizer_Stage3 = functools.partial(WindowedStage3, plan=plan)
        try:
            return super()._configure_zero_optimizer(optimizer)
        finally:
            stage3.DeepSpeedZeroOptimizer_Stage3 = saved

    def get_data_types(self) -> tuple[Any, Any]:
        """Model and gradient-accumulation dtypes: fp32 accumulation by default when gradients are accumulated at all.

        DeepSpeed's own default adds 16-bit micro-batch gradients in 16 bits. ``data_types.grad_accum_dtype`` overrides.
        """
        model, accumulation = super().get_data_types()
        if self._config.grad_accum_dtype is None and self.gradient_accumulation_steps() > 1:
            accumulation = torch.float32
        return model, accumulation

    def zero_reduce_bucket_size(self) -> int:
        """Elements of a reduce bucket: the config's, or one that fits what LISA reduces where the config names none.

        DeepSpeed's default of 5e8 elements would outweigh the whole sampled state.
        """
        zero = self._config.zero_config
        if "reduce_bucket_size" in zero.model_fields_set:
            return int(zero.reduce_bucket_size)
        numels = self._stack.numels()
        largest_block = max(sum(numels[i]) for i in range(len(self._stack.layers)))
        everything = sum(sum(unit) for unit in numels.values())
        return min(max(largest_block, _SMALLEST_BUCKET), everything)

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """See ``DeepSpeedEngine.forward``; frozen linears keep no input for backward."""
        if not self._backward_may_stop:
            with frozen_aware_linear():
                return super().forward(*inputs, **kwargs)
        self._frontier.refresh()
        with frozen_aware_linear(), warnings.catch_warnings():
            # Reentrant checkpointing warns of each block below the lowest sampled one; that they need none is the point.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            return super().forward(*inputs, **kwargs)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """See ``DeepSpeedEngine.backward``.

        Raises:
            EngineError: The loss depends on no sampled parameter.
        """
        if self._backward_may_stop and not loss.requires_grad:
            raise EngineError(
                f"the loss depends on no trainable parameter, though layers {list(self.sampled_layers)} are sampled. With "
                "'embeddings: never', hand-written reentrant checkpointing cuts the graph: use use_reentrant=False"
            )
        with frozen_aware_linear():  # blocks recomputed in backward
            return super().backward(loss, *args, **kwargs)

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        super()._take_model_step(*args, **kwargs)
        if not self._step_applied:  # a skipped (overflow) step is no step
            return
        before = self.interval
        self._step_in_lisa += 1
        if self.interval != before:
            self._switch(self._sampler.layers_at(self.interval))

    def _switch(self, layers: tuple[int, ...]) -> None:
        self._history.append(layers)
        if layers != self.sampled_layers:
            self._point_at(layers)
        self._log_interval()

    def _point_at(self, layers: tuple[int, ...]) -> None:
        self.optimizer.switch(layers)
        self._frontier.move(layers)
        if self._backward_may_stop:
            # Other blocks run backward now, so the recorded order of fetches no longer holds.
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _log_interval(self) -> None:
        if self.global_rank == 0:
            report = self.memory_report()
            live = sum(report[kind] for kind in _STATE_KINDS)
            logger.info(
                "interval %d: layers %s; %.1f MB of gradients and optimizer state live on a rank",
                self.interval,
                list(self.sampled_layers),
                live / 1e6,
            )

    # ---- checkpoint -----------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, save_dir: Any, tag: Any = None, client_state: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """See ``DeepSpeedEngine.save_checkpoint``; adds the step, the sampled layers and their history."""
        state = checkpoint.Progress(
            step=self._step_in_lisa,
            sampled=self.sampled_layers,
            history=tuple(self._history),
            num_layers=len(self._stack.layers),
            world_size=dist.get_world_size(),
        )
        return super().save_checkpoint(
            save_dir, tag=tag, client_state={**(client_state or {}), checkpoint.KEY: state.as_dict()}, **kwargs
        )

    def load_checkpoint(self, load_dir: Any, tag: Any = None, **kwargs: Any) -> Any:
        """See ``DeepSpeedEngine.load_checkpoint``; the blocks sampled at the save train again.

        With ``load_module_only`` or without optimizer states it is a warm start: weights are read, the schedule begins anew.

        Raises:
            CheckpointError: It is missing, truncated, of another model or world size, or not written by lisa_ds. Nothing has
                been changed on any rank.
        """
        tag = tag or checkpoint.latest_tag(Path(load_dir))
        files = [Path(self._get_ckpt_name(load_dir, tag)), Path(self._get_zero_ckpt_name(load_dir, tag))]
        progress = checkpoint.peek(files, num_layers=len(self._stack.layers), world_size=dist.get_world_size())
        # Frozen parameters are read by name from the file: the frozen set must be the saved one before they are.
        if progress.sampled != self.sampled_layers:
            self._point_at(progress.sampled)
        result = super().load_checkpoint(load_dir, tag=tag, **kwargs)
        if kwargs.get("load_module_only") or not kwargs.get("load_optimizer_states", True):
            self._step_in_lisa, self._history = 0, []
            self._switch(self._sampler.layers_at(0))
        else:
            self._step_in_lisa, self._history = progress.step, list(progress.history)
            self._log_interval()
        return result
