"""Native resume of the ZeRO-3 engine: bit for bit, wherever in the interval it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.shortened import shortened
from tests.zero3.checkpoint_runs import run_bad_checkpoints, run_resume, run_warm_starts, run_warm_starts_of_others
from tests.zero3.trajectory import Case

pytestmark = pytest.mark.multirank

CARE = {"rewarm_steps": 7, "norm_growth_limit": 1.02}
CASES = [
    Case("bf16", dtype="bf16", interval_steps=4, scheduler=True, accumulation=2),
    Case(
        *("fp16", "fp16"),
        interval_steps=4,
        overflow_at=1,
        zero_init=True,
        tied=True,
        fresh=True,
        lisa={"embeddings": {"every": 2}, **CARE},
    ),
    Case(
        "offload",
        interval_steps=4,
        offload=True,
        fresh=True,
        lisa={"embeddings": "never", "lm_head": {"every": 2}, "sampler": "cyclic", **CARE},
    ),
]
SAVED = [3, 4, 5, 6]  # boundary -1, 0, +1, and the middle of an interval


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal also where ZeRO-3's padding, which nobody initialises, happens to be NaN."""
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.fixture(scope="module", params=shortened(CASES, "fp16"), ids=lambda case: case.name)
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return run_ranks(2, run_resume, folder, request.param, folder, SAVED, timeout_s=240)


@pytest.mark.parametrize("saved", SAVED)
def test_resume_is_bit_exact(resumed: Any, saved: int) -> None:
    for rank in resumed:
        whole, part = rank["uninterrupted"], rank[saved]
        assert part.losses == whole.losses[saved:]
        assert part.grad_norms == whole.grad_norms[saved:]
        assert part.layers == whole.layers[saved:]
        assert all(torch.equal(part.parameters[name], value) for name, value in whole.parameters.items())
        assert all(same_bits(a, b) for a, b in zip(part.extra["state"], whole.extra["state"], strict=True))
        assert part.extra["history"] == whole.extra["history"]
        assert part.extra["roles"] == whole.extra["roles"][saved:]
        assert part.extra["care"] == whole.extra["care"]
        assert part.extra["mine"] == saved - 1


def test_a_run_that_was_not_restored_differs(resumed: Any) -> None:
    """Control: losses do tell steps apart, so that equality above means something."""
    whole = resumed[0]["uninterrupted"]
    skipped = whole.grad_norms.count(float("inf"))  # such a step leaves the loss as it was, on the same rows
    assert len(set(whole.losses)) >= len(whole.losses) - skipped


def test_ages_and_norms_are_part_of_where_a_run_stands(resumed: Any) -> None:
    """Control: a run resumed without them differs, where they matter."""
    whole = resumed[0]["uninterrupted"]
    if "forgetful" not in resumed[0]:
        pytest.skip("a case without re-warm-up and limit")
    assert len(set(whole.extra["roles"])) == 2  # saved with the role, and without it
    forgetful = resumed[0]["forgetful"]
    assert forgetful.losses != whole.losses[SAVED[-1] :]
    assert forgetful.grad_norms != whole.grad_norms[SAVED[-1] :]


def test_a_bad_checkpoint_is_named_and_changes_nothing(tmp_path: Path) -> None:
    for seen in run_ranks(2, run_bad_checkpoints, tmp_path, Case("bad"), tmp_path):
        assert "missing: no such checkpoint directory" in seen["missing"]
        assert "optim_states.pt: is truncated" in seen["truncated"]  # found by rank 1, told by both
        assert "model_states.pt: no such file; the checkpoint is incomplete" in seen["incomplete"]
        assert "was not written by lisa_ds" in seen["foreign"]
        assert "was saved on 3 ranks and cannot be resumed on 2" in seen["of_three_ranks"]
        assert "is of a model with 9 layers; this one has 5" in seen["deeper"]
        assert "latest: no such file" in seen["None"]
        assert "was saved with lisa.rest 'always' (now 'never')" in seen["policies"]
        assert "was saved with lisa.lm_head 'always' (now '{every: 2}')" in seen["other policies"]
        assert seen["older"] == ""  # of before a checkpoint told its roles
        assert seen["older roles"] == "('embeddings', 'lm_head', 'rest')"
        assert "has 3 groups of parameters that train, this run's has 7" in seen["groups"]
        assert seen["unharmed"] == "True"


@pytest.mark.more
def test_a_warm_start_reads_every_weight_of_the_tag_and_begins_anew(tmp_path: Path) -> None:
    case = Case("warm", dtype="bf16", zero={"stage3_param_persistence_threshold": 1000})
    for seen in run_ranks(2, run_warm_starts, tmp_path, case, tmp_path, timeout_s=240):
        assert seen["differ"]  # the two tags do
        assert seen["refused, not whole"] == seen["resumed, not whole"] == []
        for tag in ("old", "new"):
            for option in ("load_module_only", "load_optimizer_states"):
                key = f"{tag}, {option}"
                assert seen[key] == []
                assert seen[f"{key}, not whole"] == []
                assert seen[f"{key}, masters"]
                assert seen[f"{key}, states"] == 0
                assert len(seen[f"{key}, history"]) == 1
        assert seen["old, load_module_only, then"] == seen["old, load_optimizer_states, then"]
        assert seen["old, load_module_only, then"] != seen["new, load_module_only, then"]


def test_a_warm_start_reads_buffers_and_refuses_the_weights_of_another_model(tmp_path: Path) -> None:
    place = tmp_path / "saved"
    for rank, seen in enumerate(run_ranks(2, run_warm_starts_of_others, tmp_path, tmp_path)):
        assert seen["seen"] == [5.0] * 3
        assert seen["table"] == [float(rank)] * 3  # is not in the checkpoint
        assert seen["shape"] == (
            f"{place}: head.weight has shape (11, 8), but the model's has (12, 8); it is of another model"
        )
        assert seen["name"] == f"{place}: holds no bias; it is of another model"
        assert seen["shape, unharmed"]
        assert seen["name, unharmed"]
