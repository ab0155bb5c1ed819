"""The schedule: the same on every rank, in every Python, at every resume; and as random as it claims to be."""

from __future__ import annotations

import ast
import random
import time
from collections import Counter
from itertools import combinations, pairwise
from math import comb, gcd
from pathlib import Path
from typing import get_args

import pytest

import lisa_ds
from lisa_ds.config import LisaConfig
from lisa_ds.config.sampler import SamplerConfig
from lisa_ds.config.sampler_kinds import KINDS, MEASURES, PROBES, ByScores, Name
from lisa_ds.errors import ConfigError
from lisa_ds.sampling import LayerSampler, draw, resolve_interval_steps
from lisa_ds.sampling.schedule import _DRAWS

DRAWS = 20_000


def sampler(num_layers: int = 32, **config: object) -> LayerSampler:
    return LayerSampler(num_layers, LisaConfig.load(config))


def chi_square(counts: Counter[object], expected: float, cells: int) -> float:
    """Chi-square over ``cells``, in standard deviations above its mean: beyond 4 something is wrong."""
    observed = [*counts.values(), *[0] * (cells - len(counts))]
    statistic = sum((count - expected) ** 2 / expected for count in observed)
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


# A change here means that every run resumed with this version trains other layers than it would have.
GOLDEN = {
    "uniform": [(3, 6, 7), (0, 2, 8), (2, 3, 7), (1, 2, 8), (5, 7, 9), (0, 6, 8)],
    "cyclic": [(1, 2, 3), (6, 7, 8), (0, 5, 9), (1, 4, 9), (2, 4, 8), (3, 7, 9)],
    "bernoulli": [(0, 4, 5), (1,), (2, 4, 8, 9), (3, 5, 9), (1, 4), (0, 3)],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_draws_never_change(name: str) -> None:
    draws = [draw(name, seed=7, interval=i, num_layers=10, num_sampled=3) for i in (0, 1, 2, 3, 4, 99_999)]
    assert draws == GOLDEN[name]


@pytest.mark.parametrize("name", ["uniform", "cyclic", "bernoulli"])
def test_a_draw_depends_on_seed_and_interval_alone(name: str) -> None:
    def draws(intervals: range, seed: int = 0) -> list[tuple[int, ...]]:
        chosen = sampler(sampler=name, num_sampled_layers=6, seed=seed)
        return [chosen.layers_at(interval) for interval in intervals]

    state = random.getstate()
    forward = draws(range(50))
    random.seed(1)
    assert draws(range(49, -1, -1)) == forward[::-1]
    assert all(layers == tuple(sorted(set(layers))) for layers in forward)
    assert len(set(forward)) > 40
    assert draws(range(50), seed=1) != forward
    random.seed(1)
    drawn = random.random()
    random.seed(1)
    draws(range(3))
    assert random.random() == drawn  # the process-global stream was not touched
    random.setstate(state)


@pytest.mark.parametrize("name", ["uniform", "cyclic"])
def test_every_block_trains_equally_often(name: str) -> None:
    counts = Counter(
        layer for i in range(DRAWS) for layer in draw(name, seed=0, interval=i, num_layers=12, num_sampled=5)
    )
    # Without replacement the counts vary less than chi-square assumes, which only makes the bound safer.
    assert chi_square(counts, DRAWS * 5 / 12, 12) < 4


def test_every_set_is_equally_likely() -> None:
    counts = Counter(draw("uniform", seed=0, interval=i, num_layers=6, num_sampled=3) for i in range(DRAWS))
    assert set(counts) == set(combinations(range(6), 3))
    assert abs(chi_square(counts, DRAWS / 20, 20)) < 4


def test_consecutive_draws_are_independent() -> None:
    drawn = [draw("uniform", seed=0, interval=i, num_layers=4, num_sampled=1) for i in range(DRAWS)]
    assert abs(chi_square(Counter(pairwise(drawn)), DRAWS / 16, 16)) < 4


def test_bernoulli_unfreezes_each_block_on_its_own() -> None:
    drawn = [draw("bernoulli", seed=0, interval=i, num_layers=8, num_sampled=2) for i in range(DRAWS)]
    sizes = Counter(map(len, drawn))
    expected = {size: DRAWS * comb(8, size) * 0.25**size * 0.75 ** (8 - size) for size in range(6)}
    assert all(abs(sizes[size] - mean) < 4 * mean**0.5 for size, mean in expected.items())
    assert sizes[0] > 0  # the paper's rule may leave every block frozen
    pairs = Counter(pair for layers in drawn for pair in combinations(layers, 2))
    assert all(abs(pairs[pair] - DRAWS / 16) < 4 * (DRAWS / 16) ** 0.5 for pair in combinations(range(8), 2))
    assert draw("bernoulli", seed=0, interval=0, num_layers=8, num_sampled=8) == tuple(range(8))


@pytest.mark.parametrize(
    ("num_layers", "num_sampled"), [(12, 3), (12, 5), (7, 2), (7, 4), (5, 4), (3, 2), (4, 4), (1, 1), (9, 6), (80, 7)]
)
def test_a_cycle_trains_every_block_exactly_once(num_layers: int, num_sampled: int) -> None:
    count = 3 * num_layers // gcd(num_layers, num_sampled)
    drawn = [draw("cyclic", seed=3, interval=i, num_layers=num_layers, num_sampled=num_sampled) for i in range(count)]
    assert all(len(set(layers)) == num_sampled for layers in drawn)
    times = [0] * num_layers
    for position, layers in enumerate(drawn, start=1):
        for layer in layers:
            times[layer] += 1
        # Cycles finished, and begun: no block is a cycle ahead of or behind another.
        assert min(times) >= position * num_sampled // num_layers
        assert max(times) <= -(-position * num_sampled // num_layers)


def test_cycles_are_reshuffled() -> None:
    cycles = {
        tuple(draw("cyclic", seed=0, interval=4 * c + i, num_layers=4, num_sampled=1) for i in range(4))
        for c in range(400)
    }
    assert len(cycles) == 24


@pytest.mark.parametrize("num_sampled", [2, 63])
def test_a_late_interval_costs_no_more_than_an_early_one(num_sampled: int) -> None:
    chosen = sampler(127, sampler="cyclic", num_sampled_layers=num_sampled)
    begin = time.perf_counter()
    for interval in range(10**9, 10**9 + 20):
        chosen.layers_at(interval)
    assert time.perf_counter() - begin < 1


def test_fixed_trains_the_same_blocks_for_ever() -> None:
    chosen = sampler(sampler={"name": "fixed", "layers": [9, 3]})
    assert (chosen.num_sampled, chosen.layers_at(0), chosen.layers_at(7)) == (2, (3, 9), (3, 9))
    once = {draw("fixed", seed=0, interval=i, num_layers=32, num_sampled=4) for i in range(5)}
    assert len(once) == 1
    assert once != {draw("fixed", seed=1, interval=0, num_layers=32, num_sampled=4)}


@pytest.mark.parametrize(("ratio", "num_layers", "expected"), [(0.1, 30, 3), (0.29, 100, 29), (1.0, 7, 7), (0.5, 3, 1)])
def test_a_ratio_is_rounded_down_as_it_is_written(ratio: float, num_layers: int, expected: int) -> None:
    chosen = sampler(num_layers, sampling_ratio=ratio)
    assert chosen.num_sampled == len(chosen.layers_at(0)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_sampled_layers": 5}, r"num_sampled_layers: the model has 4 layers, got 5; choose 1 to 4"),
        ({"sampling_ratio": 0.2}, r"sampling_ratio: leaves no layer of the model's 4, got 0.2; it takes at least 1/4"),
        ({"sampler": {"name": "fixed", "layers": [0, 4]}}, r"layers: the model has layers 0 to 3, got \[0, 4\]"),
        ({"interval_steps": "2epoch"}, r"interval_steps: the steps of an epoch are not known here, got '2epoch'; give"),
    ],
)
def test_refuses_what_the_model_cannot_give(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler(4, **config)


@pytest.mark.parametrize(("given", "expected"), [(20, 20), ("1epoch", 50), ("3epoch", 150)])
def test_an_interval_may_be_given_in_epochs(given: int | str, expected: int) -> None:
    config = LisaConfig(interval_steps=given)
    steps = resolve_interval_steps(config, steps_per_epoch=50)
    chosen = LayerSampler(8, config, steps)
    assert steps == chosen.interval_steps == expected
    assert [chosen.interval_at(step) for step in (0, steps - 1, steps, 10 * steps)] == [0, 0, 1, 10]


@pytest.mark.parametrize("steps_per_epoch", [None, 0])
def test_an_epoch_of_unknown_length_is_refused(steps_per_epoch: int | None) -> None:
    with pytest.raises(ConfigError, match="the steps of an epoch are not known here, got '1epoch'"):
        resolve_interval_steps(LisaConfig(interval_steps="1epoch"), steps_per_epoch)


def test_hashes_tell_schedules_apart() -> None:
    def hash_of(**config: object) -> int:
        return sampler(**config).hash_at(5)

    assert hash_of() == hash_of(num_sampled_layers=2, interval_steps=20)
    different = {
        hash_of(),
        hash_of(seed=1),
        hash_of(interval_steps=10),
        hash_of(sampler="cyclic"),
        hash_of(num_layers=31),
    }
    assert len(different) == 5
    assert all(0 <= value < 2**63 for value in different)


@pytest.mark.parametrize(
    "wrong", [{"sampler": "random"}, {"interval": -1}, {"num_sampled": 0}, {"num_sampled": 9}, {"num_layers": 1}]
)
def test_a_draw_out_of_range_is_a_bug_of_the_caller(wrong: dict[str, int | str]) -> None:
    arguments = {"sampler": "uniform", "seed": 0, "interval": 0, "num_layers": 8, "num_sampled": 2} | wrong
    with pytest.raises(ValueError, match=r"^draw: "):
        draw(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["uniform", "cyclic", "bernoulli", "fixed"])
def test_frozen_layers_are_never_drawn_and_the_others_as_those_of_a_smaller_model(name: str) -> None:
    config = LisaConfig.load({"num_sampled_layers": 2, "interval_steps": 1, "sampler": name})
    whole, smaller = LayerSampler(7, config, frozen=(0, 3)), LayerSampler(5, config)
    others = (1, 2, 4, 5, 6)
    for interval in range(40):
        assert whole.layers_at(interval) == tuple(others[i] for i in smaller.layers_at(interval))
        chances = whole.probabilities_at(interval)
        assert (chances[0], chances[3]) == (0.0, 0.0)
        assert [chances[i] for i in others] == list(smaller.probabilities_at(interval))
    assert LayerSampler(7, config).layers_at(5) == LayerSampler(7, config, frozen=()).layers_at(5)


@pytest.mark.parametrize("draw", ["systematic", "successive", "bernoulli"])
def test_a_frozen_layer_takes_no_share_of_the_scores(draw: str) -> None:
    config = LisaConfig.load(
        {"num_sampled_layers": 2, "interval_steps": 1, "sampler": {"name": "weight_norm", "draw": draw}}
    )
    whole, smaller = LayerSampler(4, config, frozen=(2,)), LayerSampler(3, config)
    whole.set_scores([1.0, 2.0, 50.0, 3.0], 0)
    smaller.set_scores([1.0, 2.0, 3.0], 0)
    for interval in range(30):
        assert whole.layers_at(interval) == tuple((0, 1, 3)[i] for i in smaller.layers_at(interval))
    assert whole.probabilities_at(0) == (*smaller.probabilities_at(0)[:2], 0.0, smaller.probabilities_at(0)[2])


def test_more_layers_than_are_not_frozen_are_refused() -> None:
    config = LisaConfig.load({"num_sampled_layers": 3})
    with pytest.raises(ConfigError) as raised:
        LayerSampler(4, config, frozen=(0, 2))
    assert str(raised.value) == (
        "lisa_config: num_sampled_layers: the model has 2 layers, got 3; choose 1 to 2, or check that layers_path leads to the block stack; "
        "of 4, layers [0, 2] are frozen and do not count"
    )
    growing = LisaConfig.load({"num_sampled_layers": 1, "growth": {"schedule": {2: 3}}})
    with pytest.raises(ConfigError, match="of 4, layers \\[0, 2\\] are frozen and do not count"):
        LayerSampler(4, growing, frozen=(0, 2))


def test_a_kind_has_its_own_keys_and_every_key_a_kind() -> None:
    assert tuple(KINDS) == get_args(Name) == get_args(SamplerConfig.model_fields["name"].annotation)
    keys = {key for kind in KINDS.values() for key in kind.own_keys()}
    assert keys == set(SamplerConfig.model_fields) - {"name"}
    for name, kind in KINDS.items():
        chosen = SamplerConfig(name=name, **({"file": "scores.json"} if "file" in kind.own_keys() else {}))
        assert chosen.kind == kind(**{key: getattr(chosen, key) for key in kind.own_keys()})
        assert chosen.by_scores == isinstance(chosen.kind, ByScores) == (name not in _DRAWS)


@pytest.mark.parametrize("score", MEASURES)
def test_what_profile_measures_is_a_sampler_s(score: str) -> None:
    before = SamplerConfig(name="fisher", estimator="hutchinson", calibration_batches=3, probe_blocks=5)
    chosen = before.measuring(score)
    assert chosen.kind.probe == (score if score in PROBES else None)
    assert chosen.kind.measure == (f"{chosen.name}/{score}" if score in PROBES else "weight_norm")
    assert chosen.calibration_batches == (3 if score in PROBES else 8)
    assert chosen.probe_blocks == (5 if chosen.kind.by_windows else 1)
    assert before.measuring(None) is before
    assert SamplerConfig().measuring(None) == SamplerConfig(name="grad_norm")


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"sampler": "grad_norm"}, 8146113443467477852),
        ({"sampler": {"name": "fisher", "estimator": "hutchinson", "every": 3}, "seed": 7}, 1136876857700862607),
        (
            {"sampler": {"name": "weight_norm", "draw": "successive"}, "growth": {"schedule": {3: 4}}},
            7033178470410121251,
        ),
    ],
)
def test_the_rule_of_a_run_is_that_of_older_checkpoints(config: dict[str, object], rule: int) -> None:
    """A resume compares it; other numbers here would have every older run by scores told that it draws by another rule."""
    assert sampler(8, **config).rule() == rule


def test_nobody_but_the_kinds_themselves_compares_their_names() -> None:
    words = {*KINDS, *MEASURES, "ema", "systematic", "successive"}
    package = Path(lisa_ds.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and getattr(node.left, "attr", "") in (
                "name",
                "draw",
                "score",
                "estimator",
            ):
                constants = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                found |= {str(path.relative_to(package))} if constants & words else set()
    assert found == {"config/sampler_kinds.py"}
