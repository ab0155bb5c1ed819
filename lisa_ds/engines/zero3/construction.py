"""Construction of the engine inside DeepSpeed's: the model taken apart, the window in place of Stage 3's optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3

from lisa_ds.config import LisaConfig
from lisa_ds.config.deepspeed import accumulates_in_fp32
from lisa_ds.engines.common import policies
from lisa_ds.engines.common.backward_start import BackwardStart
from lisa_ds.engines.common.protocol import Collectives
from lisa_ds.engines.common.run import LisaRun
from lisa_ds.engines.zero3 import linear, parallel, supported
from lisa_ds.engines.zero3.optimizer import accepted
from lisa_ds.engines.zero3.optimizer.fused import FusedStage3
from lisa_ds.engines.zero3.optimizer.plan import WindowPlan
from lisa_ds.engines.zero3.optimizer.window import WindowedStage3
from lisa_ds.engines.zero3.scoring import measure
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack
from lisa_ds.memory import ModelShape, default_bucket
from lisa_ds.optim import StateFormat


class LisaConstruction(DeepSpeedEngine):
    """``DeepSpeedEngine`` whose optimizer is LISA's window; how it trains is :class:`lisa_ds.engines.zero3.engine.LisaEngine`'s.

    Args:
        lisa: The run's LISA section.
        steps_per_epoch: Given this engine, the optimizer steps in one pass over the data, for ``interval_steps: 1epoch``;
            None where unknown.
        calibration: The batches on which samplers by gradients measure their scores; see :mod:`lisa_ds.engines.zero3.scoring`.
        **kwargs: As ``deepspeed.initialize`` hands them to ``DeepSpeedEngine``.

    Raises:
        EngineError: DeepSpeed, or an option of its config, cannot be combined with LISA.
        ConfigError: The LISA section does not fit the model.
    """

    def __init__(
        self,
        *,
        lisa: LisaConfig,
        steps_per_epoch: Callable[[Any], int | None] = lambda engine: None,
        calibration: measure.Calibration | None = None,
        **kwargs: Any,
    ) -> None:
        supported.check_deepspeed()
        supported.check_options(kwargs["config_class"])
        self._lisa = lisa
        self._steps_per_epoch = steps_per_epoch
        self._calibration = calibration
        super().__init__(**kwargs)
        self.ranks: Collectives = parallel.collectives(self.device)
        """Collectives over all ranks of the run."""

    @property
    def model_shape(self) -> ModelShape:
        """Elements of each parameter by unit on this rank, for the planner; parameters frozen beforehand are apart.

        Under tensor parallelism the planner's ``world_size`` is the number of ranks that hold the same part.
        """
        return self._shape

    @property
    def state_format(self) -> StateFormat:
        """The format of optimizer state."""
        return StateFormat(self._lisa.optimizer.precision, self._lisa.optimizer.moments)

    @property
    def _fuses(self) -> bool:
        return self._lisa.optimizer.name == "masked_adamw"

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        # Here and not earlier: AutoTP replaces parameters before the optimizer is built.
        supported.check_optimizer(optimizer)
        parallel.check(self)
        if self._lisa.adapters is not None and self.mp_world_size > 1:
            raise EngineError(
                f"lisa.adapters: {self.mp_world_size} ranks share each layer here, and a share of a layer has no adapter of its own; "
                "remove lisa.adapters, or train without tensor parallelism"
            )
        if self._fuses:
            accepted.check_optimizer(optimizer, self.state_format)
        self._stack = LayerStack.of_run(self.module, self._lisa)
        self._shape = parallel.model_shape(self._stack, parallel.data_parallel_size(self), frozen=True)
        groups = getattr(optimizer, "param_groups", [])
        frozen = policies.apply(self._stack, self._lisa, {id(p) for group in groups for p in group["params"]})
        supported.check_leaf_modules(self.module, self._stack)
        self._run = LisaRun(
            self._lisa,
            num_layers=len(self._stack.layers),
            matrices=policies.matrices(self._stack, self._lisa),
            tied=self._stack.tied,
            frozen=frozen,
            steps_per_epoch=self._steps_per_epoch(self),
        )
        self._backward_start = BackwardStart(self.module, self._stack)
        self._uninstall_linear = linear.install(self.module.parameters())
        measure.check(self, self._lisa, self._calibration)
        saved = stage3.DeepSpeedZeroOptimizer_Stage3
        stage3.DeepSpeedZeroOptimizer_Stage3 = self._window()
        try:
            return super()._configure_zero_optimizer(optimizer)
        except BaseException:
            self._uninstall_linear()
            raise
        finally:
            stage3.DeepSpeedZeroOptimizer_Stage3 = saved

    def get_data_types(self) -> tuple[Any, Any]:
        """Model and gradient-accumulation dtypes: fp32 accumulation by default when gradients are accumulated at all.

        DeepSpeed's own default adds 16-bit micro-batch gradients in 16 bits. ``data_types.grad_accum_dtype`` overrides.
        """
        model, accumulation = super().get_data_types()
        accumulates = self.gradient_accumulation_steps() > 1 or not self.managed_gradient_accumulation()
        if accumulates_in_fp32(self._config.grad_accum_dtype, accumulates=accumulates):
            accumulation = torch.float32
        return model, accumulation

    def zero_force_ds_cpu_optimizer(self) -> bool:
        """Whether an offloaded optimizer must be DeepSpeed's: not if the fused step replaces its update anyway."""
        return not self._fuses and bool(super().zero_force_ds_cpu_optimizer())

    def zero_reduce_bucket_size(self) -> int:
        """Elements of the reduce bucket: the config's or, if it names none, a size that fits what LISA reduces."""
        zero = self._config.zero_config
        if "reduce_bucket_size" in zero.model_fields_set:
            return int(zero.reduce_bucket_size)
        return default_bucket(ModelShape.from_numels(self._stack.numels()))

    def _window(self) -> Any:
        """The constructor that is called in place of Stage 3's class."""
        plan = WindowPlan(
            unit_of=self._stack.unit_of,
            sampled=self._run.history[0],
            roles=self._run.roles_at(0),
            lr_scales=policies.lr_scales(self._lisa),
            rewarm=self._run.rewarm,
            growth_limit=self._run.growth_limit,
        )
        if self._fuses:
            return functools.partial(FusedStage3, plan=plan, state_format=self.state_format, seed=self._lisa.seed)
        return functools.partial(WindowedStage3, plan=plan)
