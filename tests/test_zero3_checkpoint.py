"""Native resume of the ZeRO-3 engine: bit for bit, wherever in the interval it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.trajectory import Case
from tests.zero3_runs import run_bad_checkpoints, run_resume

pytestmark = pytest.mark.multirank

CASES = [
    Case("bf16", dtype="bf16", interval_steps=4, scheduler=True, accumulation=2),
    Case("offload", interval_steps=4, offload=True, lisa={"embeddings": "never", "sampler": "cyclic"}),
]
SAVED = [3, 4, 5, 6]  # boundary -1, 0, +1, and the middle of an interval


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal also where ZeRO-3's padding, which nobody initialises, happens to be NaN."""
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
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
        assert part.extra["mine"] == saved - 1


def test_a_run_that_was_not_restored_differs(resumed: Any) -> None:
    """Control: losses do tell steps apart, so that equality above means something."""
    losses = resumed[0]["uninterrupted"].losses
    assert len(set(losses)) == len(losses)


def test_a_bad_checkpoint_is_named_and_changes_nothing(tmp_path: Path) -> None:
    for seen in run_ranks(2, run_bad_checkpoints, tmp_path, Case("bad"), tmp_path):
        assert "missing: no such checkpoint directory" in seen["missing"]
        assert "optim_states.pt: is truncated" in seen["truncated"]  # found by rank 1, told by both
        assert "model_states.pt: no such file; the checkpoint is incomplete" in seen["incomplete"]
        assert "was not written by lisa_ds" in seen["foreign"]
        assert "was saved on 3 ranks and cannot be resumed on 2" in seen["of_three_ranks"]
        assert "is of a model with 9 layers; this one has 6" in seen["deeper"]
        assert "latest: no such file" in seen["None"]
        assert seen["unharmed"] == "True"
