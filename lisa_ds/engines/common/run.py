"""A LISA run, independent of the framework: step count, draws and history, which units train and at which rate."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import policy_of
from lisa_ds.engines.common import policies
from lisa_ds.engines.common.draws import Draws
from lisa_ds.engines.common.growth_limit import NormGrowthLimit
from lisa_ds.engines.common.progress import Progress
from lisa_ds.engines.common.protocol import Engine
from lisa_ds.engines.common.rewarm import Rewarm
from lisa_ds.errors import EngineError
from lisa_ds.layers import ROLES
from lisa_ds.sampling import LayerSampler, resolve_interval_steps
from lisa_ds.sampling.matrices import Matrices
from lisa_ds.sampling.roles import roles_at

logger = logging.getLogger("lisa_ds")


class LisaRun:
    """The state machine of a run: an engine reports each step to it, and is called back to train the next units.

    Args:
        config: The run's LISA section.
        num_layers: Blocks of the whole model, on whichever ranks they are.
        matrices: What is drawn of the whole model, where that is not blocks.
        tied: Whether head and embeddings are one weight.
        frozen: Parameters frozen before the engine was built; see :func:`lisa_ds.engines.common.policies.apply`.
        steps_per_epoch: Optimizer steps in one pass over the data; None where unknown.

    Raises:
        ConfigError: The section does not fit the model.
    """

    def __init__(
        self,
        config: LisaConfig,
        *,
        num_layers: int,
        matrices: Matrices | None = None,
        tied: bool,
        frozen: policies.Frozen,
        steps_per_epoch: int | None,
    ) -> None:
        self.config, self.num_layers, self.tied, self.frozen = config, num_layers, tied, frozen
        self.sampler = LayerSampler(
            num_layers=num_layers,
            config=config,
            interval_steps=resolve_interval_steps(config, steps_per_epoch),
            frozen=frozen.units,
            matrices=matrices,
        )
        self.step = 0
        """Applied optimizer steps."""
        self.history: list[tuple[int, ...]] = [self.sampler.layers_at(0)]
        """Every set of blocks drawn so far, in order; the last one trains now."""
        self.rewarm = Rewarm(config.rewarm_steps, policies.always_roles(config, tied=tied))
        self.growth_limit = NormGrowthLimit(config.norm_growth_limit)
        self.draws: Draws
        """Made by the engine once it can measure, and given to :meth:`begin`."""

    def begin(self, draws: Draws) -> None:
        """Use ``draws`` from now on, and check that all ranks have the same config.

        Raises:
            EngineError: They differ. Every rank raises.
        """
        self.draws = draws
        draws.agree("the lisa config", (self.config.model_dump_json(), self.sampler.hash_at(0)))

    # ---- where it stands ------------------------------------------------------------------------------------------

    @property
    def interval(self) -> int:
        """Index of the current interval, from 0."""
        return self.sampler.interval_at(self.step)

    @property
    def ends_interval(self) -> bool:
        """Whether the next applied step is the last one of its interval."""
        return self.sampler.interval_at(self.step + 1) != self.interval

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices for the user, a line each."""
        return (*self.frozen.notices, *self.sampler.notices)

    def roles_at(self, interval: int) -> tuple[str, ...]:
        """Roles that train in ``interval``."""
        return roles_at(self.config, interval, num_layers=self.num_layers, tied=self.tied)

    def what_trains(self, engine: Engine) -> str:
        """The layers that train now, and the roles if they differ between intervals: for a log line."""
        return policies.told(self.config, engine.sampled_layers, engine.sampled_roles)

    def rates(self, engine: Engine, lr: float) -> str:
        """The learning rate of what is drawn and of each role, where the optimizer's own is ``lr``: for a log line."""
        asked = [role for role in ROLES if policy_of(self.config, role, tied=self.tied) != "never"]
        return policies.rates(self.config, engine.present(asked), lr)

    def scale_rates(self, engine: Engine) -> None:
        """Set the learning-rate factors of the blocks that train."""
        layers = engine.sampled_layers
        drawn = layers == self.sampler.layers_at(self.interval)  # and not chosen by a caller of switch_to
        engine.set_lr_scales(self.sampler.lr_scales_of(layers, self.interval) if drawn else {})

    # ---- steps and switches ---------------------------------------------------------------------------------------

    def note_loss(self, loss: Tensor) -> None:
        """Record the loss of a micro-batch, ``()``."""
        self.draws.note_loss(loss)

    def stepped(self, engine: Engine) -> bool:
        """Record an applied step (not a skipped one); returns whether it ended an interval and a switch was made."""
        before = self.interval
        self.step += 1
        if self.interval == before:
            return False
        self._switch(engine, self.draws.at(self.interval), self.roles_at(self.interval))
        return True

    def draw_first(self, engine: Engine) -> bool:
        """Measure scores and make the first draw by them, if still to be done; returns whether it was."""
        if not self.draws.pending:
            return False
        self.history.pop()
        self._switch(engine, self.draws.at(self.interval, ended=False), engine.sampled_roles)
        return True

    def switch_to(self, engine: Engine, layers: Iterable[int]) -> None:
        """Train exactly ``layers`` until the next boundary of the schedule.

        Raises:
            EngineError: A layer does not exist, or cannot train. Nothing has changed.
        """
        wanted = tuple(sorted({int(layer) for layer in layers}))
        count, what = self.sampler.num_layers, "layers" if self.config.unit == "block" else "matrices"
        if wanted and not 0 <= wanted[0] <= wanted[-1] < count:
            raise EngineError(f"switch_to: got {what} {list(wanted)}, but the model has {what} 0 to {count - 1}")
        if idle := sorted(set(wanted).intersection(self.frozen.units)):
            raise EngineError(f"switch_to: {what} {idle} were frozen before the engine was built, got {list(wanted)}")
        if self.draws.pending:
            self.draws.go_on()
            self.history.pop()
        self._switch(engine, wanted, engine.sampled_roles)

    def _switch(self, engine: Engine, layers: tuple[int, ...], roles: tuple[str, ...]) -> None:
        engine.train_units(layers, roles)
        self.scale_rates(engine)
        self.history.append(layers)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def progress(self, engine: Engine) -> Progress:
        """The progress of the run, for a checkpoint."""
        return Progress(
            step=self.step,
            sampled=engine.sampled_layers,
            roles=engine.sampled_roles,
            history=tuple(self.history),
            num_layers=self.sampler.num_layers,
            policies=policies.describe(self.config),
            next_draw=self._next_draw(),
            frozen=self.frozen.names,
            draws=self.draws.state_dict(),
        )

    def refusal(self, progress: Progress) -> str | None:
        """Why this run cannot resume from ``progress``; None if it can."""
        return progress.refusal(
            num_layers=self.sampler.num_layers, policies=policies.describe(self.config), frozen=self.frozen.names
        )

    def resume(self, engine: Engine, progress: Progress, where: Any) -> bool:
        """Resume from ``progress``, whose units the engine trains already; returns whether the schedule is unchanged.

        Raises:
            EngineError: Ranks were given different checkpoints. Every rank raises.
        """
        self.step, self.history = progress.step, list(progress.history)
        self.draws.agree(f"{where}", (progress.step, progress.sampled))
        if progress.draws is None:
            self.draws.go_on()
        else:
            self.draws.load_state_dict(progress.draws)
        self.scale_rates(engine)
        return progress.next_draw == self._next_draw()

    def begin_anew(self, engine: Engine) -> None:
        """Restart the schedule at its first interval."""
        self.step = 0
        self.draws.begin_anew()
        first = self.sampler.layers_at(0)
        engine.train_units(first, self.roles_at(0))
        self.scale_rates(engine)
        self.history = [first]

    def _next_draw(self) -> int:
        """Fingerprint of the schedule: hash of the next draw or, if future scores decide it, of the rule of draws."""
        return self.sampler.rule() or self.sampler.hash_at(self.interval + 1)
