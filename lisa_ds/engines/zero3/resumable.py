"""Saving and resuming an engine: the schedule's state beside DeepSpeed's own, and a warm start from weights alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from lisa_ds.engines.zero3 import checkpoint, detour, policies
from lisa_ds.engines.zero3.warm import load_weights
from lisa_ds.errors import CheckpointError

logger = logging.getLogger("lisa_ds")


class ResumableEngine(DeepSpeedEngine):
    """The part of :class:`~lisa_ds.engines.zero3.engine.LisaEngine` that writes and reads checkpoints."""

    # Without DeepSpeed's exclude_frozen_parameters: it would drop the blocks that are not sampled at the moment. Trainers
    # that look for the argument (transformers does, for adapters) find that it is not there, and save everything.
    def save_checkpoint(
        self, save_dir: Any, tag: Any = None, client_state: dict[str, Any] | None = None, save_latest: bool = True
    ) -> Any:
        """See ``DeepSpeedEngine.save_checkpoint``; adds the step, the sampled layers and their history."""
        state = checkpoint.Progress(
            step=self._step_in_lisa,
            sampled=self.sampled_layers,
            roles=self.sampled_roles,
            history=tuple(self._history),
            num_layers=len(self._stack.layers),
            policies=policies.describe(self._lisa),
            next_draw=self._next_draw(),
            frozen=self._frozen.names,
            draws=self._draws.state_dict(),
        )
        return super().save_checkpoint(
            save_dir,
            tag=tag,
            client_state={**(client_state or {}), checkpoint.KEY: state.as_dict()},
            save_latest=save_latest,
        )

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
        tag = str(tag or checkpoint.latest_tag(Path(load_dir)))
        if load_module_only or not load_optimizer_states:
            self._check_warm_start(Path(load_dir) / tag)
            self.optimizer.forget_second_copies()
            with detour.partitioned(self.optimizer):
                load_weights(self.module, Path(load_dir) / tag)
            self._begin_anew()
            return str(Path(load_dir) / tag), {}
        files = [Path(self._get_ckpt_name(load_dir, tag)), Path(self._get_zero_ckpt_name(load_dir, tag))]
        progress = checkpoint.peek(
            files,
            len(self._stack.layers),
            policies.describe(self._lisa),
            frozen=self._frozen.names,
            world_size=dist.get_world_size(),
            tensor_size=self.mp_world_size,
        )
        self.optimizer.forget_second_copies()
        # Frozen parameters are read by name from the file: the frozen set must be the saved one before they are.
        self._point_at(progress.sampled, progress.roles)
        result = super().load_checkpoint(
            load_dir,
            tag=tag,
            load_module_strict=load_module_strict,
            load_lr_scheduler_states=load_lr_scheduler_states,
            custom_load_fn=custom_load_fn,
        )
        self._step_in_lisa, self._history = progress.step, list(progress.history)
        self._draws.agree(f"{Path(load_dir) / tag}", (progress.step, progress.sampled))
        if progress.draws is None:
            self._draws.go_on()
        else:
            self._draws.load_state_dict(progress.draws)
        self._scale_rates()
        if progress.next_draw != self._next_draw() and self.global_rank == 0:
            logger.warning(
                "%s: was saved under another seed, sampler, number of layers or interval; from the next interval on, this "
                "run's are drawn",
                Path(load_dir) / tag,
            )
        self._log_interval()
        return result

    def _next_draw(self) -> int:
        """A hash of the next interval's draw; where scores to come decide on it, of the rule."""
        return self._sampler.rule() or self._sampler.hash_at(self.interval + 1)

    def _check_warm_start(self, directory: Path) -> None:
        if self.mp_world_size > 1:
            raise CheckpointError(
                f"{directory}: without optimizer states a checkpoint is read by whole layers, but here {self.mp_world_size} ranks "
                "share each; load its weights into the model before initialize"
            )

    def _begin_anew(self) -> None:
        self._step_in_lisa, self._history = 0, []
        self._draws.begin_anew()
        first = self._sampler.layers_at(0)
        self._point_at(first, self._roles_at(0))
        self._scale_rates()
        self.optimizer.refresh_fp32_params()
        self.optimizer.forget_moments()
        self._history.append(first)
        self._log_interval()

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        """As DeepSpeed's; frozen means frozen for good, not merely in this interval."""
        state = super()._zero3_consolidated_16bit_state_dict()
        if state and exclude_frozen_parameters:
            owned = self.optimizer.owned()
            for name, parameter in self.module.named_parameters():
                if id(parameter) not in owned:
                    state.pop(name, None)
        return state
