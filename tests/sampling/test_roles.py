"""When embeddings, head and rest train: a pure function of the config and the interval, beside the blocks' draw."""

from __future__ import annotations

from typing import Any

import pytest

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import policy_of, share_of
from lisa_ds.sampling import LayerSampler
from lisa_ds.sampling.roles import roles_at

LAYERS, MANY = 10, 4000


def trains(role: str, fields: dict[str, Any], *, tied: bool = False, many: int = MANY) -> list[bool]:
    config = LisaConfig.load(fields)
    return [role in roles_at(config, i, num_layers=LAYERS, tied=tied) for i in range(many)]


def test_by_default_everything_always_trains() -> None:
    assert roles_at(LisaConfig(), 5, num_layers=LAYERS, tied=False) == ("embeddings", "lm_head", "rest")


@pytest.mark.parametrize("every", [2, 3, 7])
def test_every_n_trains_in_multiples_of_n(every: int) -> None:
    in_ = trains("lm_head", {"lm_head": {"every": every}}, many=50)
    assert [interval for interval, trained in enumerate(in_) if trained] == list(range(0, 50, every))


def test_every_interval_is_always() -> None:
    assert LisaConfig.load({"embeddings": {"every": 1}}) == LisaConfig(embeddings="always")


@pytest.mark.parametrize("count", [1, 2, 5, 10])
@pytest.mark.parametrize("role", ["embeddings", "lm_head"])
def test_sampled_trains_as_often_as_a_block(role: str, count: int) -> None:
    in_ = trains(role, {role: "sampled", "num_sampled_layers": count})
    # Four standard deviations of a share among so many draws.
    assert abs(sum(in_) / MANY - count / LAYERS) <= 4 * (count / LAYERS * (1 - count / LAYERS) / MANY) ** 0.5
    assert in_ == trains(role, {role: "sampled", "num_sampled_layers": count})
    assert count == LAYERS or in_ != trains(role, {role: "sampled", "num_sampled_layers": count, "seed": 1})


def test_draws_are_independent_of_each_other_and_of_the_blocks() -> None:
    fields = {"embeddings": "sampled", "lm_head": "sampled", "num_sampled_layers": 5, "sampler": "bernoulli"}
    both = [trains(role, fields) for role in ("embeddings", "lm_head")]
    sampler = LayerSampler(LAYERS, LisaConfig.load(fields))
    drawn = [sampler.layers_at(interval) for interval in range(MANY)]
    both += [[layer in layers for layers in drawn] for layer in range(LAYERS)]
    for i, first in enumerate(both):
        for second in both[:i]:
            together = sum(a and b for a, b in zip(first, second, strict=True)) / MANY
            assert abs(together - 0.25) < 0.035  # five standard deviations
    plain = LayerSampler(LAYERS, LisaConfig.load({"num_sampled_layers": 5, "sampler": "bernoulli"}))
    assert [plain.layers_at(interval) for interval in range(50)] == drawn[:50]
    assert trains("embeddings", fields) == trains("embeddings", {**fields, "lm_head": "never"})


@pytest.mark.parametrize("policy", ["always", "never", "sampled", {"every": 3}])
def test_what_is_left_of_a_tied_head_goes_with_the_embeddings(policy: Any) -> None:
    fields = {"embeddings": policy}
    assert trains("lm_head", fields, tied=True, many=60) == trains("embeddings", fields, tied=True, many=60)


@pytest.mark.parametrize(("policy", "share"), [("always", 1.0), ("never", 0.0), ("sampled", 0.3), ({"every": 4}, 0.25)])
def test_shares_of_the_intervals(policy: Any, share: float) -> None:
    config = LisaConfig.load({"embeddings": policy, "num_sampled_layers": 3})
    assert float(share_of(config, "embeddings", tied=False, num_layers=LAYERS)) == share
    assert float(share_of(config, "lm_head", tied=True, num_layers=LAYERS)) == share
    assert str(policy_of(config, "embeddings", tied=False)) == (
        policy if isinstance(policy, str) else f"{{every: {policy['every']}}}"
    )


def test_an_interval_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="interval=-1"):
        roles_at(LisaConfig(), -1, num_layers=LAYERS, tied=False)
