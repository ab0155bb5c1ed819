"""``LayerSampler``: which blocks train in which interval, drawn uniformly or by scores measured during the run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from lisa_ds.config import LisaConfig
from lisa_ds.config.sampler_kinds import ByScores
from lisa_ds.errors import ConfigError
from lisa_ds.sampling import probabilities, scores, statistics
from lisa_ds.sampling.growth import Growth
from lisa_ds.sampling.matrices import Matrices, MatrixDraws
from lisa_ds.sampling.schedule import draw, draw_by_probability


class LayerSampler:
    """Draws the blocks that train in each interval.

    Samplers without scores keep no state: any interval may be asked for, in any order. Samplers by scores use the
    scores that were set last, and draw uniformly before there are any; their :meth:`state_dict` must be saved in
    checkpoints.

    Where matrices are drawn, they are numbered as blocks are otherwise.

    Args:
        num_layers: Number of blocks of the model.
        config: The ``lisa`` section of a run.
        interval_steps: Optimizer steps of an interval, from :func:`resolve_interval_steps`; may be left out
            where ``config.interval_steps`` is a number of steps.
        frozen: Blocks that can never train, and are never drawn; the others are drawn as if they were the whole model.
        matrices: What is drawn in place of blocks, with ``unit: matrix``; ``frozen``, scores and draws are of those.

    Raises:
        ConfigError: The config asks for more blocks than can train, for one that cannot, or for none; or it counts in epochs,
            and ``interval_steps`` is left out; or its file of scores is of another model.
        DataError: A file of scores or norms is missing or malformed.

    Example:
        >>> sampler = LayerSampler(32, LisaConfig(num_sampled_layers=2, interval_steps=20))
        >>> sampler.layers_at(0) == sampler.layers_at(sampler.interval_at(step=19))
        True
    """

    def __init__(
        self,
        num_layers: int,
        config: LisaConfig,
        interval_steps: int | None = None,
        *,
        frozen: Collection[int] = (),
        matrices: Matrices | None = None,
    ) -> None:
        if (matrices is None) != (config.unit == "block"):
            raise ValueError(f"LayerSampler: matrices={matrices!r} with unit {config.unit!r}")
        num_layers = num_layers if matrices is None else len(matrices.sizes)
        self.num_layers = num_layers
        """Number of blocks of the model, or of its matrices where they are drawn."""
        self.drawable = tuple(layer for layer in range(num_layers) if layer not in frozen)
        """The blocks that can be drawn, ascending."""
        self.config = config
        """The ``lisa`` section."""
        self._by_matrix: MatrixDraws | None = None
        if matrices is not None:
            self.num_sampled, self.growth = config.num_sampled(matrices.num_blocks), Growth(matrices.num_blocks, config)
            self._by_matrix = MatrixDraws(config, matrices, frozen)
            self.drawable = self._by_matrix.drawable
        else:
            self.num_sampled, self.growth = self._numbers(sorted(frozen))
        self.interval_steps = resolve_interval_steps(config, None) if interval_steps is None else interval_steps
        """Optimizer steps of an interval; neither micro-steps nor skipped steps count."""
        if self.interval_steps < 1:
            raise ConfigError(f"{config.where('interval_steps')}: should be 1 or more, got {interval_steps}")
        self.notices: list[str] = []
        """Notices for the user about the scores, a line each."""
        self._scores: tuple[float, ...] | None = None
        self._scored_at = 0
        self._seen: list[float | None] = [None] * num_layers  # moving averages of what the training batches showed
        self._known: tuple[Any, Any] | None = None  # the last probabilities, and what they were computed from
        if config.sampler.file is not None:
            self._scores = self._from_file(config.sampler.file)
        elif config.sampler.lora_norms is not None and config.sampler.full_norms is not None:
            self._scores = self._from_norms(config.sampler.lora_norms, config.sampler.full_norms)

    def _numbers(self, frozen: list[int]) -> tuple[int, Growth]:
        """The number of blocks in the first draw (if it varies from draw to draw, on average), and of later draws."""
        config, by_name = self.config, self.config.sampler.layers
        if by_name and not set(frozen).isdisjoint(by_name):
            raise ConfigError(
                f"{config.where('sampler.layers')}: layers {sorted(set(frozen).intersection(by_name))} have no parameter that requires "
                f"grad, so nothing would train there, got {list(by_name)}; unfreeze them, or leave them out"
            )
        try:
            count = self.num_layers if by_name else len(self.drawable)
            return config.num_sampled(count), Growth(count, config)
        except ConfigError as error:
            if not frozen or by_name:
                raise
            raise ConfigError(f"{error}; of {self.num_layers}, layers {frozen} are frozen and do not count") from None

    @property
    def scores(self) -> tuple[float, ...] | None:
        """The score of each block; None for samplers without scores, and before the first are set."""
        return self._scores

    def interval_at(self, step: int) -> int:
        """Return the index of the interval that optimizer step ``step`` (from 0) falls in."""
        return step // self.interval_steps

    def num_sampled_at(self, interval: int) -> int:
        """Return how many blocks ``interval`` draws; if the number varies, on average; of matrices, how many blocks' worth."""
        return self.growth.at(interval)

    def layers_at(self, interval: int) -> tuple[int, ...]:
        """Return the blocks that train in ``interval`` (from 0), ascending."""
        chosen, seed, count = self.config.sampler, self.config.seed, self.num_sampled_at(interval)
        kind = chosen.kind
        if chosen.layers is not None:
            return tuple(sorted(chosen.layers))
        if self._by_matrix is not None:
            return self._by_matrix.at(interval, count, self._shares() if isinstance(kind, ByScores) else None)
        if not isinstance(kind, ByScores):
            places = draw(chosen.name, seed=seed, interval=interval, num_layers=len(self.drawable), num_sampled=count)
        else:
            places = draw_by_probability(
                kind.draw,
                seed=seed,
                interval=interval,
                probabilities=() if kind.by_shares else self._chances(count),
                shares=self._shares(),
                num_sampled=count,
            )
        return tuple(self.drawable[place] for place in places)

    def probabilities_at(self, interval: int) -> tuple[float, ...]:
        """Return the probability with which each block is in the draw of ``interval``; its expected size is their sum.

        For ``fixed`` they are 0 and 1. For ``cyclic`` they are those of an interval if nothing is known of the others.
        """
        chosen, count = self.config.sampler, self.num_sampled_at(interval)
        if chosen.kind.same_all_along:
            fixed = self.layers_at(interval)
            return tuple(float(layer in fixed) for layer in range(self.num_layers))
        if self._by_matrix is not None:
            return self._by_matrix.chances(count, self._shares() if chosen.by_scores else None)
        known = self._chances(count) if chosen.by_scores else (count / len(self.drawable),) * len(self.drawable)
        of_layer = dict(zip(self.drawable, known, strict=True))
        return tuple(of_layer.get(layer, 0.0) for layer in range(self.num_layers))

    def _chances(self, count: int) -> tuple[float, ...]:
        """Inclusion probabilities of the blocks that can be drawn, by scores."""
        kind = self.config.sampler.kind
        assert isinstance(kind, ByScores)
        key = (self._scores, count)
        if self._known is None or self._known[0] != key:
            if kind.by_shares:
                found = probabilities.successive_inclusion_probabilities(self._shares(), count)
            else:
                found = probabilities.inclusion_probabilities(self._shares(), count, kind.floor)
            self._known = (key, found)
        result: tuple[float, ...] = self._known[1]
        return result

    def lr_scales_of(self, layers: Iterable[int], interval: int) -> dict[int, float]:
        """Return the learning-rate factor of each of ``layers`` in ``interval``; empty if there are no factors."""
        cap = self.config.sampler.inverse_probability_cap
        if cap is None:
            return {}
        chances = self.probabilities_at(interval)
        uniform = math.fsum(chances[layer] for layer in self.drawable) / len(self.drawable)
        drawn = set(self.drawable).intersection(layers)  # what trains beside matrices has no factor
        return {layer: min(cap, uniform / chances[layer]) if chances[layer] else cap for layer in sorted(drawn)}

    def needs_scores(self, interval: int) -> bool:
        """Whether scores must be measured and set before ``interval`` is drawn."""
        if self.config.sampler.kind.measure is None:
            return False
        return self._scores is None or not self._scored_at <= interval < self._scored_at + self.config.sampler.every

    def set_scores(self, scores: Sequence[float], interval: int) -> None:
        """Draw by ``scores`` from ``interval`` on.

        Raises:
            ValueError: Their number is not that of the blocks, or one is negative or not finite.
        """
        if len(scores) != self.num_layers:
            raise ValueError(f"set_scores: got {len(scores)} scores for {self.num_layers} layers")
        probabilities.weights(scores)
        self._scores, self._scored_at = tuple(scores), interval

    @property
    def watches_gradients(self) -> bool:
        """Whether :meth:`observe` must be called with gradient norms at the end of each interval."""
        return self.config.sampler.kind.watches_gradients

    def observe(self, norms: Sequence[float | None], interval: int) -> None:
        """Record the gradient norms of an interval's blocks; None for blocks that did not train.

        Blocks that have never trained get the mean of those that have.
        """
        decay = self.config.sampler.ema_decay
        for layer, norm in enumerate(norms):
            if norm is not None and math.isfinite(norm):
                before = self._seen[layer]
                self._seen[layer] = norm if before is None else decay * before + (1 - decay) * norm
        known = [average for average in self._seen if average is not None]
        if known:
            mean = math.fsum(known) / len(known)
            self.set_scores([mean if average is None else average for average in self._seen], interval)

    def hash_at(self, interval: int) -> int:
        """Return a 63-bit hash of the draw of ``interval``; ranks compare it, and a checkpoint and its resumed run."""
        facts: tuple[Any, ...] = (self.num_layers, self.interval_steps, interval, self.layers_at(interval))
        return fingerprint(facts)

    def rule(self) -> int:
        """Return a 63-bit fingerprint of the rule of draws; unlike draws by scores, it is known in advance."""
        if self.config.sampler.by_scores or self.config.growth is not None:
            keys = ["num_sampled_layers", "sampling_ratio", "seed", "sampler", "growth"]
            keys += ["unit", "block_rest"] if self.config.unit != "block" else []  # as it was before there were others
            count = self.num_layers if len(self.drawable) == self.num_layers else self.drawable
            return fingerprint((count, self.interval_steps, self.config.model_dump_json(include=set(keys))))
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What future draws depend on besides the config: plain values."""
        return {
            "measure": self.config.sampler.kind.measure,
            "scores": self._scores,
            "scored_at": self._scored_at,
            "seen": list(self._seen),
            "growth": self.growth.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from :meth:`state_dict`."""
        kind = self.config.sampler.kind
        if (
            not kind.reads_file and state["measure"] == kind.measure
        ):  # a file's scores, or another measure's, are its own
            self._scores = None if state["scores"] is None else tuple(state["scores"])
            self._scored_at, self._seen = state["scored_at"], list(state["seen"])
        self.growth.load_state_dict(state["growth"])

    def _shares(self) -> tuple[float, ...]:
        scores = self._scores or (1.0,) * self.num_layers
        return probabilities.weights([scores[layer] for layer in self.drawable], self.config.sampler.temperature)

    def _from_file(self, path: str) -> tuple[float, ...]:
        found = scores.LayerScores.read(path)
        if len(found.scores) != self.num_layers:
            raise ConfigError(
                f"{self.config.where('sampler.file')}: {path} has scores of {len(found.scores)} layers, but the model has "
                f"{self.num_layers}; profile this model"
            )
        return found.scores

    def _from_norms(self, lora: str, full: str) -> tuple[float, ...]:
        norms = []
        for key, path in (("lora_norms", lora), ("full_norms", full)):
            history = statistics.read(Path(path).expanduser())
            means = history.mean_weight_norm()
            blocks = [means.get(block, 0.0) for block in history.start.blocks]
            if len(blocks) != self.num_layers or not all(norm > 0 for norm in blocks):
                raise ConfigError(
                    f"{self.config.where(f'sampler.{key}')}: {path} should have a positive weight norm of each of the model's "
                    f"{self.num_layers} layers, got {blocks}"
                )
            norms.append(blocks)
        found = scores.ratios(*norms)
        if above := [layer for layer, ratio in enumerate(found) if ratio > 1]:
            self.notices.append(
                f"weight norms under LoRA are above those of full fine-tuning in layers {above} (ratio up to {max(found):.3g}); "
                "ratios count in proportion to each other, and no layer is drawn with a probability above 1"
            )
        return found


def resolve_interval_steps(config: LisaConfig, steps_per_epoch: int | None) -> int:
    """Return the optimizer steps of an interval, also where the config counts in epochs.

    Args:
        config: The ``lisa`` section.
        steps_per_epoch: Optimizer steps of an epoch; ``None`` if unknown.

    Raises:
        ConfigError: The config counts in epochs, and the length of an epoch is unknown.
    """
    epochs = config.interval_epochs
    if epochs is None:
        return int(config.interval_steps)
    if steps_per_epoch is None or steps_per_epoch < 1:
        raise ConfigError(
            f"{config.where('interval_steps')}: the steps of an epoch are not known here, "
            f"got {config.interval_steps!r}; give a number of optimizer steps"
        )
    return epochs * steps_per_epoch


def fingerprint(facts: Any) -> int:
    """Return a 63-bit fingerprint of ``facts``, by which two ranks or runs can tell whether theirs are equal."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1  # fits an int64 tensor
