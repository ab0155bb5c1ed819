"""Draws by scores: their probabilities against brute force, their limits, and what a resumed sampler draws."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError, DataError
from lisa_ds.sampling import LayerSampler, statistics
from lisa_ds.sampling.probabilities import (
    inclusion_probabilities,
    successive_inclusion_probabilities,
    weights,
)
from lisa_ds.sampling.schedule import draw_by_probability
from lisa_ds.sampling.scores import LayerScores, ratios

DRAWS = 20_000
SKEWED = (8.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.25)
SHARES = [weights(SKEWED), weights(SKEWED, 0.3), (0.96, 0.01, 0.01, 0.01, 0.01), (0.4, 0.3, 0.2, 0.1, 0.0)]


def sampler(num_layers: int = 8, **config: Any) -> LayerSampler:
    return LayerSampler(num_layers, LisaConfig.load({"interval_steps": 1, **config}))


def scored(scores: tuple[float, ...] = SKEWED, **config: Any) -> LayerSampler:
    name = {"name": "grad_norm", **config.pop("sampler", {})}
    made = sampler(len(scores), num_sampled_layers=3, sampler=name, **config)
    made.set_scores(scores, 0)
    return made


def by_enumeration(shares: tuple[float, ...], count: int) -> list[float]:
    """Inclusion probabilities of successive draws, over every order of every set."""
    found = [0.0] * len(shares)
    for order in permutations(range(len(shares)), count):
        probability, left = 1.0, math.fsum(shares)
        for block in order:
            probability *= shares[block] / left if left > 0 else 0.0
            left = math.fsum(s for i, s in enumerate(shares) if i not in order[: order.index(block) + 1])
        for block in order:
            found[block] += probability
    return found


def deviations(counts: Counter[int], chances: tuple[float, ...], draws: int = DRAWS) -> float:
    """Chi-square of the counts against ``chances`` in standard deviations above its mean: beyond 4 something is wrong."""
    free = [block for block, chance in enumerate(chances) if 1e-9 < chance < 1 - 1e-9]
    for block, chance in enumerate(chances):
        if block not in free:
            assert counts[block] == round(chance) * draws
    statistic = sum((counts[b] - draws * chances[b]) ** 2 / (draws * chances[b] * (1 - chances[b])) for b in free)
    return (statistic - len(free)) / max(1.0, (2 * len(free)) ** 0.5)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_probabilities_are_proportional_as_far_as_they_can_be(shares: tuple[float, ...], count: int) -> None:
    found = inclusion_probabilities(shares, count)
    assert math.isclose(math.fsum(found), count, rel_tol=1e-12)
    assert all(0 <= probability <= 1 for probability in found)
    ratios_ = [p / s for p, s in zip(found, shares, strict=True) if s > 0 and p < 1]
    assert not ratios_ or math.isclose(max(ratios_), min(ratios_), rel_tol=1e-9)


def test_any_scores_have_probabilities_that_add_up() -> None:
    stream = random.Random(0)
    for _ in range(2000):
        scores = [
            stream.choice([0.0, stream.random() ** 4, 1e-9 * stream.random()]) for _ in range(stream.randint(1, 12))
        ]
        count, floor = stream.randint(1, len(scores)), stream.choice([0.0, 0.1, 0.5, 1.0])
        found = inclusion_probabilities(weights(scores), count, floor)
        assert math.isclose(math.fsum(found), count, rel_tol=1e-9)
        assert all(floor * count / len(scores) - 1e-12 <= probability <= 1 for probability in found)
        order = sorted(range(len(scores)), key=scores.__getitem__)
        assert all(found[a] <= found[b] + 1e-12 for a, b in pairwise(order))


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_successive_probabilities_are_those_of_every_order(shares: tuple[float, ...], count: int) -> None:
    found = successive_inclusion_probabilities(shares, count)
    assert found == pytest.approx(by_enumeration(shares, count), abs=1e-6)


def test_successive_probabilities_of_shares_that_lie_far_apart() -> None:
    for temperature in (0.01, 0.02, 0.05):
        shares = weights([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], temperature)
        assert successive_inclusion_probabilities(shares, 3) == pytest.approx(by_enumeration(shares, 3), abs=1e-6)


def test_successive_probabilities_of_a_large_model_add_up() -> None:
    stream = random.Random(0)
    shares = weights([stream.lognormvariate(0, 2) for _ in range(128)])
    found = successive_inclusion_probabilities(shares, 8)
    assert math.isclose(math.fsum(found), 8, rel_tol=1e-9)
    # Sampled as a race of exponential times, which knows nothing of the integral.
    counts: Counter[int] = Counter()
    for _ in range(5000):
        times = [stream.expovariate(share) for share in shares]
        counts.update(sorted(range(128), key=times.__getitem__)[:8])
    assert deviations(counts, found, 5000) < 4


@pytest.mark.parametrize("method", ["systematic", "successive", "bernoulli"])
@pytest.mark.parametrize("shares", SHARES)
def test_draws_meet_their_probabilities(method: str, shares: tuple[float, ...]) -> None:
    chances = inclusion_probabilities(shares, 2, floor=0.0)
    drawn = [
        draw_by_probability(method, seed=1, interval=i, probabilities=chances, shares=shares, num_sampled=2)
        for i in range(DRAWS)
    ]
    assert all(layers == tuple(sorted(set(layers))) for layers in drawn)
    if method != "bernoulli":
        assert {len(layers) for layers in drawn} == {2}
    expected = successive_inclusion_probabilities(shares, 2) if method == "successive" else chances
    counts = Counter(layer for layers in drawn for layer in layers)
    assert deviations(counts, expected) < 4
    # The control: the same counts do not pass for uniform draws.
    assert deviations(counts, (2 / len(shares),) * len(shares)) > 100


def test_successive_draws_are_flatter_than_their_shares() -> None:
    shares = weights(SKEWED)
    assert successive_inclusion_probabilities(shares, 3)[0] < inclusion_probabilities(shares, 3)[0] == 1.0


def test_no_block_is_drawn_twice_or_left_out_by_rounding() -> None:
    for count, chances in ((3, (0.1,) * 30), (2, (1.0, 1 / 3, 1 / 3, 1 / 3)), (7, (0.7,) * 10)):
        for interval in range(500):
            drawn = draw_by_probability(
                "systematic", seed=0, interval=interval, probabilities=chances, shares=(), num_sampled=count
            )
            assert len(set(drawn)) == count


@pytest.mark.parametrize("sets", [{"draw": "systematic"}, {"draw": "successive"}, {"temperature": 0.5}, {"floor": 0.5}])
def test_a_sampler_draws_by_its_scores(sets: dict[str, Any]) -> None:
    chosen = scored(sampler=sets)
    counts = Counter(layer for i in range(DRAWS) for layer in chosen.layers_at(i))
    assert deviations(counts, chosen.probabilities_at(0)) < 4
    assert deviations(counts, scored(sampler={"temperature": 5.0}).probabilities_at(0)) > 100


def test_limits_of_temperature_and_floor() -> None:
    def chances(**sets: Any) -> tuple[float, ...]:
        return scored(sampler={"floor": 0.0, **sets}).probabilities_at(0)

    assert chances(temperature=1e6) == pytest.approx([3 / 8] * 8, abs=1e-5)
    assert chances(temperature=1e-3) == pytest.approx([1, 1, 1, 0, 0, 0, 0, 0], abs=1e-9)
    assert chances(floor=1.0) == pytest.approx([3 / 8] * 8)
    assert min(chances(floor=0.5)) == pytest.approx(0.5 * 3 / 8)
    assert scored((0.0,) * 8).probabilities_at(0) == pytest.approx([3 / 8] * 8)
    # The unit of the scores does not matter.
    scaled = scored(tuple(1e30 * score for score in SKEWED), sampler={"temperature": 0.7, "floor": 0.0})
    assert scaled.probabilities_at(0) == pytest.approx(chances(temperature=0.7))


def test_learning_rates_by_inverse_probability_are_capped_and_leave_uniform_draws_alone() -> None:
    chosen = scored(sampler={"inverse_probability_cap": 2.0, "floor": 0.2})
    for interval in range(50):
        scales = chosen.lr_scales_of(chosen.layers_at(interval), interval)
        assert set(scales) == set(chosen.layers_at(interval))
        for layer, scale in scales.items():
            assert scale == pytest.approx(min(2.0, 3 / 8 / chosen.probabilities_at(interval)[layer]))
    assert scored().lr_scales_of((0, 1), 0) == {}
    assert scored((1.0,) * 8, sampler={"inverse_probability_cap": 4.0}).lr_scales_of((0, 7), 0) == {0: 1.0, 7: 1.0}
    starved = scored((1.0,) * 4 + (0.0,) * 4, sampler={"inverse_probability_cap": 4.0, "floor": 0.0})
    assert starved.lr_scales_of((7,), 0) == {7: 4.0}


def test_averages_of_what_training_showed() -> None:
    chosen = sampler(4, num_sampled_layers=2, sampler={"name": "grad_norm", "score": "ema", "ema_decay": 0.5})
    assert chosen.watches_gradients
    assert not chosen.needs_scores(0)
    assert chosen.probabilities_at(0) == pytest.approx([0.5] * 4)
    chosen.observe([4.0, None, 2.0, None], 1)
    assert chosen.scores == (4.0, 3.0, 2.0, 3.0)  # unknown ones count as the mean of the others
    chosen.observe([2.0, None, None, float("nan")], 2)
    assert chosen.scores == (3.0, 2.5, 2.0, 2.5)


def test_scores_are_measured_when_due() -> None:
    chosen = sampler(sampler={"name": "grad_norm", "every": 3})
    assert chosen.needs_scores(0)
    chosen.set_scores(SKEWED, 0)
    assert [chosen.needs_scores(i) for i in range(7)] == [False, False, False, True, True, True, True]
    chosen.set_scores(SKEWED, 3)
    assert [chosen.needs_scores(i) for i in (5, 6)] == [False, True]
    assert not sampler().needs_scores(0)
    with pytest.raises(ValueError, match="got 2 scores for 8 layers"):
        chosen.set_scores([1.0, 2.0], 0)


def test_a_resumed_sampler_draws_what_the_first_would_have() -> None:
    config = {"sampler": {"name": "grad_norm", "score": "ema"}, "growth": {"patience": 1, "max_layers": 4}}
    first = sampler(num_sampled_layers=2, **config)
    for interval in range(1, 5):
        first.observe([None if i in (3, interval) else 1.0 + i for i in range(8)], interval)
        first.growth.observe(1.0)
    second = sampler(num_sampled_layers=2, **config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.num_sampled_at(5) == 4
    for interval in range(5, 9):
        assert first.layers_at(interval) == second.layers_at(interval)
        for chosen in (first, second):
            chosen.observe([2.0, 1.0] + [None] * 6, interval)
    assert first.layers_at(9) == second.layers_at(9)
    assert first.state_dict() == second.state_dict()
    assert first.rule() == second.rule() != sampler(num_sampled_layers=3, **config).rule()


def test_a_resumed_run_takes_its_number_of_layers_and_its_measure_from_its_own_config() -> None:
    before = sampler(num_sampled_layers=2).state_dict()
    more = sampler(num_sampled_layers=4)
    more.load_state_dict(before)
    assert more.num_sampled_at(0) == len(more.layers_at(0)) == 4
    grown = sampler(growth={"patience": 1, "max_layers": 8})
    for _ in range(9):
        grown.growth.observe(1.0)
    fewer = sampler(growth={"patience": 1, "max_layers": 3})
    fewer.load_state_dict(grown.state_dict())
    assert (grown.num_sampled_at(0), fewer.num_sampled_at(0)) == (8, 3)
    measured = sampler(sampler={"name": "grad_norm", "every": 5})
    measured.set_scores(SKEWED, 100)
    others = sampler(sampler="fisher"), sampler(sampler={"name": "grad_norm", "every": 5})
    for other in others:
        other.load_state_dict(measured.state_dict())
    assert [other.needs_scores(101) for other in others] == [True, False]
    assert others[1].needs_scores(11)  # of a run whose intervals are longer now


def test_growth_by_schedule_and_on_a_plateau() -> None:
    planned = sampler(num_sampled_layers=2, growth={"schedule": {3: 4, 5: 8}})
    assert [len(planned.layers_at(i)) for i in range(7)] == [2, 2, 2, 4, 4, 8, 8]
    grown = sampler(num_sampled_layers=2, growth={"patience": 2, "threshold": 0.1, "add": 3, "max_layers": 6}).growth
    counts = []
    for loss in (4.0, 3.0, 2.9, 2.85, 2.0, 1.99, math.nan, 1.98, 1.97, 1.97, 1.97):
        grown.observe(loss)
        counts.append(grown.at(0))
    assert counts == [2, 2, 2, 5, 5, 5, 6, 6, 6, 6, 6]
    poor = sampler(num_sampled_layers=2, growth={"patience": 1, "add": 5, "max_layers": 8}).growth
    for _ in range(4):
        poor.observe(1.0, affords=lambda count: count <= 4)
    assert poor.at(0) == 4


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"schedule": {3: 9}}, r"growth.schedule: the model has 8 layers, got 9"),
        ({"patience": 1, "max_layers": 9}, r"growth.max_layers: the model has 8 layers, got 9"),
        (
            {"patience": 1, "max_layers": 1},
            r"growth.max_layers: is below the 2 layers that are drawn from the start, got 1",
        ),
    ],
)
def test_growth_fits_the_model(growth: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler(growth=growth)


def test_scores_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    LayerScores("grad_norm/mean", SKEWED, model="tiny", settings={"batches": 4}).write(file)
    assert LayerScores.read(file).scores == SKEWED
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    chosen = sampler(num_sampled_layers=3, sampler={"name": "fixed_scores", "file": str(file)})
    assert chosen.probabilities_at(0) == scored().probabilities_at(0)
    assert not chosen.needs_scores(0)
    with pytest.raises(
        ConfigError, match=r"sampler.file: .* has scores of 8 layers, but the model has 30; profile this"
    ):
        sampler(30, sampler={"name": "fixed_scores", "file": str(file)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; `lisa-ds profile` writes such a file"),
        ('{"format": "lisa_ds.layer_sc', "is not JSON, or truncated"),
        ("[1, 2]", "is not a file of scores"),
        ('{"format": "lisa_ds.layer_scores/1", "score": "x"}', "is not a whole file of scores: 'scores'"),
        ('{"format": "lisa_ds.layer_scores/1", "score": "x", "scores": [1, -2]}', r"none negative, got \[1, -2\]"),
        ('{"format": "lisa_ds.layer_scores/1", "score": "x", "scores": ["a"]}', r"should be finite numbers"),
    ],
)
def test_a_bad_file_of_scores_is_told_of(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "scores.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=f"^{file}: .*{message}"):
        LayerScores.read(file)


def test_the_papers_ratio_of_norms() -> None:
    assert ratios([1.0, 3.0], [2.0, 2.0]) == (0.5, 1.5)
    with pytest.raises(ValueError, match="equally many layers"):
        ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        ratios([1.0], [0.0])


def record(path: Path, norms: list[list[float]]) -> str:
    """Layer statistics of a run: a list of its blocks' weight norms for each recording."""
    units = ("embeddings", *map(str, range(len(norms[0]))))
    writer = statistics.Writer(path, statistics.Start(step=0, method="full", model="tiny", units=units))
    for step, values in enumerate(norms, start=1):
        by_unit = dict(zip(units, [50.0, *values], strict=True))
        none = dict.fromkeys(units)
        writer.append(
            statistics.Recording(
                **{"step": step, "interval": step, "weight_norm": by_unit, "gradient_norm": none, "update_norm": none},
                **{"sampled": units, "gradient_steps": 1},
            )
        )
    return str(path)


def test_the_papers_probabilities_come_from_the_recordings_of_two_runs(tmp_path: Path) -> None:
    lora = record(tmp_path / "lora.jsonl", [[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 8.0]])  # means 2, 2, 2, 6
    full = record(tmp_path / "full.jsonl", [[4.0, 8.0, 4.0, 4.0]])
    ratio = {"name": "weight_norm", "lora_norms": lora, "full_norms": full, "floor": 0.0}
    chosen = sampler(4, num_sampled_layers=1, sampler=ratio)
    assert chosen.scores == (0.5, 0.25, 0.5, 1.5)
    assert chosen.probabilities_at(0) == pytest.approx([0.5 / 2.75, 0.25 / 2.75, 0.5 / 2.75, 1.5 / 2.75])
    assert not chosen.needs_scores(7)
    (notice,) = chosen.notices
    assert "above those of full fine-tuning in layers [3] (ratio up to 1.5)" in notice
    assert sampler(4, num_sampled_layers=1, sampler=ratio | {"lora_norms": full}).notices == []
    with pytest.raises(
        ConfigError, match=r"sampler.lora_norms: .*lora.jsonl should have a positive weight norm of each .* 8 l"
    ):
        sampler(8, sampler=ratio)
