"""The harness itself: what ranks return, how their failures and hangs look, and that DeepSpeed accepts the group."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank


def exchange(base: int) -> tuple[int, str, list[int]]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")  # the group exists: it must be taken as it is
    mine = torch.tensor([base + dist.get_rank()])
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return deepspeed.comm.get_rank(), os.environ["LOCAL_RANK"], [int(value) for value in everyone]


def stumble(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("a mistake of rank 1")
        time.sleep(60)
    dist.barrier()


def test_every_rank_returns_its_value(tmp_path: Path) -> None:
    assert run_ranks(2, exchange, tmp_path, 10) == [(0, "0", [10, 11]), (1, "1", [10, 11])]


@pytest.mark.parametrize(
    ("how", "report"), [("raises", "rank 1 of 2 failed(.|\n)*a mistake of rank 1"), ("hangs", "(.|\n)*stumble")]
)
def test_a_rank_that_raises_or_hangs_fails_the_test(tmp_path: Path, how: str, report: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=report):
        run_ranks(2, stumble, tmp_path, how, timeout_s=10)
