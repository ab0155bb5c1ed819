"""Who a process is among the ranks, from what launchers and Slurm set."""

from __future__ import annotations

import pytest

from lisa_ds.cluster.environment import fill
from lisa_ds.errors import ClusterError

STEP = {
    "SLURM_JOB_ID": "40012",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu7",
}


def test_a_slurm_task_is_a_rank() -> None:
    environ = dict(STEP)
    fill(environ)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environ[name] for name in names] == ["5", "1", "8", "4", "gpu7", "20012"]


@pytest.mark.parametrize(("tasks", "node", "expected"), [("4(x2),3", 2, "3"), ("2,1(x3)", 0, "2"), ("1", 0, "1")])
def test_tasks_are_counted_on_each_node(tasks: str, node: int, expected: str) -> None:
    environ = STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    fill(environ)
    assert environ["LOCAL_WORLD_SIZE"] == expected


def test_what_a_launcher_or_a_batch_script_has_set_stays() -> None:
    environ = STEP | {"RANK": "3"}
    fill(environ)
    assert environ == STEP | {"RANK": "3"}
    environ = STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    fill(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("head", "29500")


def test_outside_of_a_step_a_process_is_alone() -> None:
    environs: list[dict[str, str]] = [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
    ]  # then: a batch script
    for environ in environs:
        fill(environ)
        assert (environ["RANK"], environ["WORLD_SIZE"], environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


@pytest.mark.parametrize(
    "names",
    [
        "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_RANK MV2_COMM_WORLD_LOCAL_RANK MV2_COMM_WORLD_SIZE MV2_COMM_WORLD_LOCAL_SIZE",
        "PMI_RANK MPI_LOCALRANKID PMI_SIZE MPI_LOCALNRANKS",
    ],
)
def test_a_process_of_mpirun_is_a_rank(names: str) -> None:
    environ = dict(zip(names.split(), ["3", "1", "4", "2"], strict=True))
    with pytest.raises(
        ClusterError, match=r"mpirun has started 4 ranks, 2 of them on this host: set MASTER_ADDR to the host"
    ):
        fill(dict(environ))
    environ["MASTER_ADDR"] = "gpu1"
    fill(environ)
    told = [environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")]
    assert told == ["3", "1", "4", "2", "29500"]
    environ = STEP | dict(zip(names.split(), ["3", "1", "4", "2"], strict=True))
    fill(environ)
    assert environ["RANK"] == STEP["SLURM_PROCID"]


def test_half_of_what_a_launcher_sets_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"WORLD_SIZE is 4, but RANK is not set; a launcher sets both"):
        fill({"WORLD_SIZE": "4"})


def test_hosts_that_cannot_be_told_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError, match=r"SLURM_STEP_NODELIST is 'n\[1-2\]', but there is no scontrol"):
        fill(STEP | {"SLURM_STEP_NODELIST": "n[1-2]"})
