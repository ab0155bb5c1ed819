"""A DeepSpeed engine that trains the sampled blocks, and draws new ones after every interval."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisa_ds.engines.common import adapters
from lisa_ds.engines.zero3.checkpoint import files
from lisa_ds.engines.zero3.checkpoint.save_load import Checkpoints
from lisa_ds.engines.zero3.construction import LisaConstruction
from lisa_ds.engines.zero3.release import let_go_of
from lisa_ds.engines.zero3.scoring.draws import draws_of
from lisa_ds.engines.zero3.watch.memory_report import memory_report
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack, Unit
from lisa_ds.memory import SAMPLED_KINDS

logger = logging.getLogger("lisa_ds")


class LisaEngine(LisaConstruction):
    """``DeepSpeedEngine`` under LISA; built by :func:`lisa_ds.initialize` or by an armed trainer.

    Args:
        **kwargs: As :class:`~lisa_ds.engines.zero3.construction.LisaConstruction` takes them: ``lisa``, ``steps_per_epoch``,
            ``calibration``, and what ``deepspeed.initialize`` hands to ``DeepSpeedEngine``.

    Raises:
        EngineError: DeepSpeed, or an option of its config, cannot be combined with LISA.
        ConfigError: The LISA section does not fit the model.
    """

    _destroyed = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._aim_backward()
        self._run.begin(draws_of(self, self._run.sampler, self._calibration))
        self._run.scale_rates(self)
        if self.global_rank == 0:
            for notice in self._run.notices:
                logger.warning("%s", notice)
        if not self._run.draws.pending:
            self._log_interval()

    # ---- public ---------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> LayerStack:
        """The model, taken apart into what is drawn and the roles."""
        return self._stack

    @property
    def sampled_layers(self) -> tuple[int, ...]:
        """Blocks that train now, ascending; with ``unit: matrix``, indices of matrices in ``stack.units``."""
        sampled: tuple[int, ...] = self.optimizer.sampled
        return sampled

    @property
    def sampled_roles(self) -> tuple[str, ...]:
        """The roles (``embeddings``, ``lm_head``, ``rest``) that train now; no head that is tied and nothing else."""
        roles: tuple[str, ...] = self.optimizer.roles
        return roles

    @property
    def what_trains(self) -> str:
        """The layers that train now, and the roles if they differ between intervals: for a log line."""
        return self._run.what_trains(self)

    @property
    def interval(self) -> int:
        """Index of the current interval, from 0: applied optimizer steps // ``interval_steps``."""
        return self._run.interval

    @property
    def interval_steps(self) -> int:
        """Optimizer steps of an interval."""
        return self._run.sampler.interval_steps

    @property
    def ends_interval(self) -> bool:
        """Whether the next applied step is the last one of its interval, after which layers are drawn anew."""
        return self._run.ends_interval

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The probability of each block in the present interval's draw."""
        return self._run.sampler.probabilities_at(self.interval)

    @property
    def layer_history(self) -> list[tuple[int, ...]]:
        """Every set of blocks drawn so far, in order; the last one trains now."""
        return list(self._run.history)

    @property
    def has_moments(self) -> bool:
        """Whether everything that trains has taken a step: moments come with the first."""
        found: bool = self.optimizer.unit_state.has_moments
        return found

    def memory_report(self) -> dict[str, int]:
        """Bytes of live model-state tensors on this rank; see :func:`lisa_ds.engines.zero3.watch.memory_report.memory_report`."""
        return memory_report(self.optimizer, self.module.parameters())

    def state_of(self, unit: Unit) -> list[dict[str, Any]]:
        """The live optimizer state of one unit on this rank; see :class:`lisa_ds.engines.common.protocol.Engine`.

        Moments are flat, ``(numel,)``, this rank's partition of every sub-group of the unit with its padding, in the
        format of the state: with ``moments: int8``, ``exp_avg`` and ``exp_avg_sq`` are codes, and ``exp_avg_scale`` and
        ``exp_avg_sq_scale`` their scales. ``master`` is present if weights have a master copy.
        """
        found: list[dict[str, Any]] = self.optimizer.unit_state.of(unit)
        return found

    def unit_squares(self) -> dict[Unit, Tensor]:
        """Squared gradient norm of each unit that trains; see :class:`lisa_ds.engines.common.protocol.Engine`."""
        squares: dict[Unit, Tensor] = self.optimizer.unit_squares()
        return squares

    def switch_to(self, layers: Iterable[int]) -> None:
        """Train exactly ``layers`` from the next forward on, until the next boundary of the schedule.

        For callers with their own schedule; set ``interval_steps`` beyond the run's length to disable LISA's draws.
        Every rank must call it with the same layers, between ``step()`` and the next ``forward()``. Embeddings and head
        stay as they are.

        Raises:
            EngineError: A layer does not exist, or cannot train, or gradients are being accumulated. Nothing has changed.
        """
        self._run.switch_to(self, layers)
        self._log_interval()

    def draw_first(self) -> None:
        """Measure scores and make the first draw by them, if that is still to be done.

        The first forward of training does this, not the construction of the engine: a run that is resumed in between
        has its scores in the checkpoint. Call it earlier if forward is a bad time for other passes through the model.
        Every rank must call it.
        """
        if self._run.draw_first(self):
            self._log_interval()

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Refused: DeepSpeed's reload would rebuild the 16-bit weights from the sampled sub-groups alone.

        Raises:
            EngineError: Always.
        """
        raise EngineError(
            "offload_states is not supported under LISA; offload the optimizer by the DeepSpeed config instead"
        )

    def destroy(self) -> None:
        """See ``DeepSpeedEngine.destroy``; also drops the process's other references to the engine and its model."""
        self._uninstall_linear()
        super().destroy()
        if not self._destroyed:  # again when it is collected, which each rank does at a time of its own
            self._destroyed = True
            let_go_of(self.module)

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """See ``DeepSpeedEngine.forward``."""
        if torch.is_grad_enabled():
            if self.module.training:
                self.draw_first()
            self.optimizer.require_grad_of_window()
            if self._backward_may_stop:
                self._backward_start.refresh()
        return super().forward(*inputs, **kwargs)

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        self._check_gradients()
        super()._take_model_step(*args, **kwargs)
        if self._step_applied and self.count_step():  # a skipped (overflow) step is no step
            self._log_interval()

    def count_step(self) -> bool:
        """Count an applied step; after an interval's last one draw layers and switch to them, and return True."""
        return self._run.stepped(self)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """See ``DeepSpeedEngine.backward``."""
        if torch.is_tensor(loss) and loss.numel() == 1:
            self._run.note_loss(loss)
        return super().backward(loss, *args, **kwargs)

    def _check_gradients(self) -> None:
        """Refuse to step if a sampled block got no gradient, being cut out of backward: its moments would decay."""
        missing = self.optimizer.sampled_without_gradient()
        if missing and self._backward_may_stop:
            raise EngineError(
                f"{self._stack.told(missing)} are sampled, but backward gave them no gradient. With frozen embeddings, reentrant "
                "checkpointing that is not transformers' own (torch's, deepspeed.checkpointing) cuts them off: use "
                "torch.utils.checkpoint with use_reentrant=False, or let the embeddings' output require grad: "
                "embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())"
            )

    def rates(self, lr: float) -> str:
        """The learning rate of what is drawn and of each role, where the optimizer's own is ``lr``: for a log line."""
        return self._run.rates(self, lr)

    # ---- what the run asks ----------------------------------------------------------------------------------------

    def present(self, roles: Iterable[str]) -> tuple[str, ...]:
        """Those of ``roles`` in which something can train."""
        found: tuple[str, ...] = self.optimizer.present(roles)
        return found

    def train_units(self, layers: Collection[int], roles: Collection[str]) -> None:
        """Train these units, unless they train already; see :class:`lisa_ds.engines.common.protocol.Engine`."""
        layers, roles = tuple(layers), self.present(roles)
        if (layers, roles) == (self.sampled_layers, self.sampled_roles):
            return
        stopped = self._backward_may_stop
        self.optimizer.switch(layers, roles)
        self._aim_backward()
        if stopped or self._backward_may_stop:
            # Other blocks run backward now, so the recorded order of fetches no longer holds.
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def set_lr_scales(self, scales: Mapping[int, float]) -> None:
        """Learning-rate factor of blocks from the next step on; of those not named, 1."""
        self.optimizer.block_lr_scales = scales

    def _aim_backward(self) -> None:
        """Set the cut-off of backward: above the embeddings, if the user, the policy or the interval freezes them."""
        self._backward_may_stop = not any(parameter.requires_grad for parameter in self._stack.embeddings)
        self._backward_start.move(self.sampled_layers)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self, self._run, self.optimizer, self.module, self.mp_world_size)

    # Without DeepSpeed's exclude_frozen_parameters: it would drop the blocks that are not sampled at the moment. Trainers
    # that look for the argument (transformers does, for adapters) find that it is not there, and save everything.
    def save_checkpoint(
        self, save_dir: Any, tag: Any = None, client_state: dict[str, Any] | None = None, save_latest: bool = True
    ) -> Any:
        """See ``DeepSpeedEngine.save_checkpoint``; adds the step, the sampled layers and their history."""
        state = self._checkpoints.client_state(client_state)
        return super().save_checkpoint(save_dir, tag=tag, client_state=state, save_latest=save_latest)

    def load_checkpoint(
        self,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        """See ``DeepSpeedEngine.load_checkpoint``; the blocks sampled at the save train again.

        With ``load_module_only`` or without optimizer states it is a warm start: weights are read, from a checkpoint of any
        number of ranks, the schedule begins anew, and the client state returned is empty.

        Raises:
            CheckpointError: It is missing, truncated, of another model, world size or policy, or not written by lisa_ds.
                Nothing has been changed on any rank.
        """
        tag = str(tag or files.latest_tag(Path(load_dir)))
        directory = Path(load_dir) / tag
        if load_module_only or not load_optimizer_states:
            self._checkpoints.start_warm(directory)
            self._log_interval()
            return str(directory), {}
        paths = [Path(self._get_ckpt_name(load_dir, tag)), Path(self._get_zero_ckpt_name(load_dir, tag))]
        progress = self._checkpoints.prepare(paths)
        result = super().load_checkpoint(
            load_dir,
            tag=tag,
            load_module_strict=load_module_strict,
            load_lr_scheduler_states=load_lr_scheduler_states,
            custom_load_fn=custom_load_fn,
        )
        self._checkpoints.go_on(progress, directory)
        self._log_interval()
        return result

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        """See DeepSpeed's method; a frozen parameter is one that never trains, not one frozen in this interval.

        The adapters of ``lisa.adapters`` are added to the weights.
        """
        state = super()._zero3_consolidated_16bit_state_dict()
        if state and exclude_frozen_parameters:
            owned = self.optimizer.owned()
            for name, parameter in self.module.named_parameters():
                if id(parameter) not in owned:
                    state.pop(name, None)
        rule = adapters.rule_of(self.module)
        return adapters.merged(state, rule) if state and rule else state

    def _log_interval(self) -> None:
        if self.global_rank == 0 and logger.isEnabledFor(logging.INFO):
            report = self.memory_report()
            live = sum(report[kind] for kind in SAMPLED_KINDS)
            logger.info(
                "interval %d: %s; %.1f MB of gradients and optimizer state live on a rank",
                self.interval,
                self.what_trains,
                live / 1e6,
            )
