"""What was frozen before the engine was built: it stays so, is left out of the draw, and is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.zero3.presence_runs import Case, Model, frozen_runs, reference

pytestmark = pytest.mark.multirank

CASES = [
    Case("layer", leaf=False, frozen=("layers.1.",), lisa={"interval_steps": 1}),
    Case("two layers", leaf=False, frozen=("layers.0.", "layers.2."), lisa={"interval_steps": 2}),
    Case(
        "parts",
        leaf=False,
        frozen=("layers.0.", "layers.2.always.weight", "embed", "tower.0"),
        lisa={"interval_steps": 2},
    ),
    Case("cyclic", leaf=False, frozen=("layers.1.",), lisa={"interval_steps": 1, "sampler": "cyclic"}),
    Case("by scores", leaf=False, frozen=("layers.0.",), lisa={"interval_steps": 2, "sampler": "weight_norm"}),
    Case(
        "by gradients",
        leaf=False,
        frozen=("layers.0.",),
        lisa={"interval_steps": 2, "sampler": {"name": "grad_norm", "score": "ema"}},
    ),
    Case("another optimizer", optimizer="adamw", leaf=False, frozen=("layers.1.", "head"), lisa={"interval_steps": 2}),
]


@pytest.mark.more
def test_it_stays_frozen_and_the_others_train(tmp_path: Path) -> None:
    found = run_ranks(2, frozen_runs, tmp_path, CASES, str(tmp_path))[0]
    for case in CASES:
        sampled, weights, _ = found["runs"][case.name]
        start, expected = Model(case).state_dict(), reference(case, 2, sampled)
        drawn = {layer for layers in sampled for layer in layers}
        assert drawn <= {layer for layer in range(3) if f"layers.{layer}." not in case.frozen}, case.name
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, expected[name], rtol=0, atol=2e-6, msg=lambda text, at=name: f"{at}: {text}"
            )
            if name.startswith(case.frozen):
                assert torch.equal(weight, start[name]), (case.name, name)
    assert {layer for layers in found["runs"]["layer"][0] for layer in layers} == {0, 2}
    assert found["told"] == {
        "layer": ["layers [1] are frozen: no parameter of theirs requires grad. They are left out of the draw"],
        "two layers": ["layers [0, 2] are frozen: no parameter of theirs requires grad. They are left out of the draw"],
        "parts": [
            "layers [0] are frozen: no parameter of theirs requires grad. They are left out of the draw",
            "layers [2] are frozen in part, and that part stays so: in layer 2, 1 of 8 parameters (layers.2.always.weight)",
            "embeddings: 1 of 1 parameters are frozen (embed.weight) and stay so, whatever lisa.embeddings says",
            "rest: 2 of 4 parameters are frozen (tower.0.weight, ...) and stay so, whatever lisa.rest says",
        ],
        "cyclic": ["layers [1] are frozen: no parameter of theirs requires grad. They are left out of the draw"],
        "by scores": ["layers [0] are frozen: no parameter of theirs requires grad. They are left out of the draw"],
        "by gradients": ["layers [0] are frozen: no parameter of theirs requires grad. They are left out of the draw"],
        "another optimizer": [
            "layers [1] are frozen: no parameter of theirs requires grad. They are left out of the draw",
            "lm_head: 2 of 2 parameters are frozen (head.weight, ...) and stay so, whatever lisa.lm_head says",
        ],
    }
    file = f"{tmp_path}/saved/zero_pp_rank_0_mp_rank_00_model_states.pt"
    assert found["resume"].splitlines()[0] == (
        f"{file}: 8 parameters were frozen when it was saved, and train here (layers.1.always.bias, layers.1.always.weight, ...); "
        "9 parameters are frozen here, and trained when it was saved (embed.weight, layers.0.always.bias, ...); freeze the same "
        "ones before initialize, or start from its weights alone"
    )
