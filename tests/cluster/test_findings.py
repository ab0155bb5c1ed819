"""What `lisa-ds check` concludes from what its ranks measured and from what a launcher told them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lisa_ds.cluster import hosts, probes
from lisa_ds.cluster.findings import odd_ones
from lisa_ds.errors import ClusterError

pytestmark = pytest.mark.multirank


def test_what_most_hosts_have_is_right() -> None:
    found = odd_ones({"a": "1", "b": "2", "c": "2"}, "torch", "x")
    assert [str(one) for one in found] == ["a: torch is 1, but 2 on b, c; x"]
    assert [one.host for one in odd_ones({"a": "1", "b": None}, "torch", "x")] == ["b"]  # of two, the first
    assert odd_ones({"a": "1", "b": "1"}, "torch", "x") == []


def test_a_slow_rank_is_named() -> None:
    names = {0: "gpu1", 1: "gpu1", 2: "gpu7"}
    measured: dict[int, dict[str, Any]] = {rank: {"copy_s": 1.0, "matmul_s": 2.0} for rank in names}
    assert probes.slow_ranks(names, measured) == []
    measured[2] = {"copy_s": 1.4, "matmul_s": 5.0}
    (slow,) = probes.slow_ranks(names, measured)
    assert (slow.host, slow.is_error) == ("gpu7 (rank 2)", False)
    assert slow.what == "multiplying matrices takes 2.5 times as long as on the median rank"


@pytest.mark.parametrize(
    ("environ", "world_size", "known"),
    [
        ({"SLURM_STEP_NODELIST": "n1,n2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 4, ["n1", "n1", "n2", "n2"]),
        ({"SLURM_STEP_NODELIST": "n1,n2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_DISTRIBUTION": "cyclic"}, 4, []),
        ({"SLURM_STEP_NODELIST": "n1,n2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 5, []),  # torchrun in the step
        ({}, 2, []),
    ],
)
def test_hosts_are_told_only_where_they_are_known(environ: dict[str, str], world_size: int, known: list[str]) -> None:
    assert list(hosts.expected(environ, world_size).values()) == known


def test_what_a_launcher_did_not_set_is_named() -> None:
    with pytest.raises(ClusterError) as error:
        hosts.place({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURMD_NODENAME": "gpu7"})
    assert str(error.value).splitlines() == [
        "gpu7: RANK: should be a whole number, got 'x'; a launcher sets it",
        "gpu7: MASTER_PORT: should be a whole number, got ''; a launcher sets it",
        "gpu7: MASTER_ADDR: should be the host of rank 0, got nothing; a launcher sets it",
    ]


def test_a_hostfile_s_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("gpu1 slots=8\ngpu2 8\n")
    with pytest.raises(
        ClusterError, match=r"hosts:2: should be a host and its ranks, as in 'gpu1 slots=8', got 'gpu2 8'"
    ):
        hosts.expected({}, 16, tmp_path / "hosts")
