"""launch/train.sbatch on a real Slurm of two nodes, and launch/multinode.sh over real ssh; a rank on each node.

Whatever happens to a run on the way, it ends with the losses and the weights of one to which nothing happens.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lisa_ds.cluster.preemption import MARKER
from tests.cluster import hosts, slurm
from tests.programs import ROOT
from tests.training_runs import write_run

pytestmark = pytest.mark.cluster

REASON = hosts.missing([*slurm.PROGRAMS, "pdsh", "sshd", "ssh-keygen"])
STEPS, SAVE_STEPS = 60, 20
SIGNALLED = ROOT / "tests/cluster/signalled.py"
TINY: dict[str, Any] = {
    **{"max_steps": STEPS, "save_steps": SAVE_STEPS, "logging_steps": 1, "learning_rate": 1e-3},
    **{"per_device_train_batch_size": 2, "bf16": True, "lr_scheduler_type": "linear"},
}
DEMO = """
model: {name_or_path: builtin:smollm2-135m}
data: {path: builtin:stdlib-docs, max_length: 48, max_rows: 64}
lisa: {num_sampled_layers: 2, interval_steps: 2, embeddings_lr_scale: 0.1}
training:
  {max_steps: 8, per_device_train_batch_size: 1, learning_rate: 5.0e-4, logging_steps: 1, save_steps: 8, bf16: true}
"""


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Hosts]:
    if REASON:
        pytest.skip(REASON)
    with hosts.Hosts(tmp_path_factory.mktemp("hosts")).up() as up:
        yield up


@pytest.fixture(scope="module")
def cluster(two_hosts: hosts.Hosts) -> Iterator[slurm.Slurm]:
    with slurm.Slurm(two_hosts).up() as up:
        yield up


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory from which everything is submitted: a model, rows, the cache."""
    folder = write_run(tmp_path_factory.mktemp("runs"), training=TINY)
    (folder / "demo.yaml").write_text(DEMO)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(cluster: slurm.Slurm, prepared: Path) -> Path:
    reference = run_to_end(cluster, prepared, "run.yaml", "reference", prebuild="1")
    for name in hosts.NAMES:
        assert "tensors on the CPU: cpu" in (reference / f"logs/prebuild-{name}.log").read_text()
    return reference


def environment(prepared: Path, output_dir: str, **more: str | Path) -> dict[str, str]:
    """What jobs of the tests inherit; the variables of launch/train.sbatch are lower-case here, without LISA_."""
    kept = {name: os.environ[name] for name in ("HOME", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LISA_DS_CACHE": str(prepared / "cache")},
        **{
            "LISA_TRAIN": str(ROOT / "launch/train.py"),
            "LISA_OUTPUT_DIR": output_dir,
            "LISA_OFFLINE": "1",
            "LISA_PREBUILD": "0",
        },
        **{(f"LISA_{name.upper()}" if name.islower() else name): str(value) for name, value in more.items()},
    }


def submit(cluster: slurm.Slurm, prepared: Path, config: str, output_dir: str, *flags: str, **more: str | Path) -> str:
    shape = ("--nodes=2", "--ntasks-per-node=1", f"--output={output_dir}-%j.out")
    return cluster.submit(
        *shape,
        *flags,
        ROOT / "launch/train.sbatch",
        config,
        cwd=prepared,
        env=environment(prepared, output_dir, **more),
    )


def run_to_end(cluster: slurm.Slurm, prepared: Path, config: str, output_dir: str, **more: str | Path) -> Path:
    cluster.wait(submit(cluster, prepared, config, output_dir, **more), "COMPLETED")
    assert (prepared / output_dir / "model").is_dir()
    return prepared / output_dir


def losses(output_dir: Path, steps: int = STEPS) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    state = json.loads((output_dir / f"checkpoint-{steps}/trainer_state.json").read_text())
    found = {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry}
    assert list(found) == list(range(1, steps + 1))
    return list(found.values())


def assert_same_end(output_dir: Path, reference: Path, steps: int = STEPS) -> None:
    assert losses(output_dir, steps) == losses(reference, steps)
    one, two = (load_file(at / "model/model.safetensors") for at in (output_dir, reference))
    assert one.keys() == two.keys()
    assert all(weight.equal(two[name]) for name, weight in one.items())
    assert not (output_dir / MARKER).exists()


def told(prepared: Path, output_dir: str) -> str:
    """What the batch script has said, in all its lives."""
    return "".join(path.read_text() for path in sorted(prepared.glob(f"{output_dir}-*.out")))


def wait_until_it_trains(output_dir: Path, interval: int = 0) -> None:
    log = output_dir / "logs/rank-0.log"
    hosts.wait_for(
        lambda: log.exists() and f"interval {interval} trains" in log.read_text(), 400, f"{log}: no interval {interval}"
    )


def marker(output_dir: Path) -> dict[str, Any]:
    hosts.wait_for((output_dir / MARKER).exists, 300, f"no {output_dir / MARKER}")
    read: dict[str, Any] = json.loads((output_dir / MARKER).read_text())
    return read


def test_the_demo_model_is_signalled_requeued_and_resumed(cluster: slurm.Slurm, prepared: Path) -> None:
    reference = run_to_end(cluster, prepared, "demo.yaml", "demo-reference")
    job = submit(cluster, prepared, "demo.yaml", "demo")
    wait_until_it_trains(prepared / "demo")
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    left = marker(prepared / "demo")
    assert 0 < left["step"] < 8
    assert left["signal"] == "SIGUSR1"
    cluster.start_now(job, restarts=1)
    cluster.wait(job, "COMPLETED", restarts=1)
    assert_same_end(prepared / "demo", reference, steps=8)
    assert {path.name for path in (prepared / "demo/logs").glob("rank-*")} == {"rank-0.log", "rank-1.log"}
    assert "layers visited: " in (prepared / "demo/logs/rank-0.log").read_text()


def test_the_signal_comes_by_itself_before_the_time_limit(
    cluster: slurm.Slurm, prepared: Path, uninterrupted: Path
) -> None:
    limit = ("--time=4", "--signal=B:USR1@60")  # Slurm may send it up to 60 s earlier
    more = {"train": SIGNALLED, "SLOW_STEP_S": "3"}
    job = submit(cluster, prepared, "run.yaml", "limited", *limit, **more)
    restarts = 0
    while cluster.job(job)["JobState"] != "COMPLETED":
        if int(cluster.job(job)["Restarts"]) > restarts:
            restarts += 1
            left = marker(prepared / "limited")
            assert (left["signal"], left["step"] < STEPS) == ("SIGUSR1", True)
            cluster.start_now(job, restarts)
        assert restarts < 4
        time.sleep(1)
    assert restarts >= 1
    assert_same_end(prepared / "limited", uninterrupted)


@pytest.mark.parametrize("how", ["taken out of service", "dead"])
def test_a_node_that_goes_down_is_survived(cluster: slurm.Slurm, prepared: Path, uninterrupted: Path, how: str) -> None:
    name = how.split()[0]
    job = submit(cluster, prepared, "run.yaml", name, train=SIGNALLED, SLOW_STEP_S="0.25")
    complete = prepared / name / f"checkpoint-{SAVE_STEPS}/trainer_state.json"
    hosts.wait_for(complete.exists, 400, "no checkpoint")
    time.sleep(1)
    if how == "dead":
        cluster.hosts.die("n2")  # Slurm misses it after a while (SlurmdTimeout), and requeues the job
        cluster.wait(job, "PENDING", restarts=1)
        assert not (prepared / name / MARKER).exists()  # nobody was asked: the checkpoint is the last that was due
        cluster.command("slurmd", host="n2")
        # Slurm tries again and again to end the job's first life on that node: started now, its second would be hit. So let it
        # be held as long as Slurm has it.
    else:  # Slurm asks the ranks by SIGTERM, and requeues the job
        cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
        cluster.start_now(job, restarts=1)
    assert "requeued: " not in told(prepared, name)  # not by the script
    cluster.wait(job, "COMPLETED", restarts=1)
    assert_same_end(prepared / name, uninterrupted)


def test_an_array_is_a_sweep_and_its_jobs_requeue_themselves(
    cluster: slurm.Slurm, prepared: Path, uninterrupted: Path
) -> None:
    (prepared / "sweep.txt").write_text(
        "training.learning_rate=1e-2 lisa.seed=1\ntraining.learning_rate=1e-3 lisa.seed=0\n"
    )
    more = {"train": SIGNALLED, "sweep": "sweep.txt", "SLOW_STEP_S": "0.1"}
    array = submit(cluster, prepared, "run.yaml", "sweep", "--array=1-2%1", **more)
    wait_until_it_trains(prepared / "sweep-1")
    second = f"{array}_2"
    wait_until_it_trains(prepared / "sweep-2")
    cluster.command("scancel", "--batch", "--signal=USR2", second)
    marker(prepared / "sweep-2")
    cluster.start_now(second, restarts=1)
    cluster.wait(second, "COMPLETED", restarts=1)
    assert (prepared / "sweep-1/model").is_dir()
    assert_same_end(prepared / "sweep-2", uninterrupted)
    assert losses(prepared / "sweep-1") != losses(uninterrupted)


def test_a_save_of_a_minute_survives_signals_and_term_is_not_requeued(
    cluster: slurm.Slurm, prepared: Path, uninterrupted: Path
) -> None:
    job = submit(cluster, prepared, "run.yaml", "slow", train=SIGNALLED, SLOW_SAVE_S="60", SLOW_STEP_S="0.25")
    wait_until_it_trains(prepared / "slow", interval=1)
    began = time.monotonic()
    cluster.command("scancel", "--batch", "--signal=TERM", job)
    for _ in range(2):
        time.sleep(15)
        cluster.command("scancel", "--batch", "--signal=USR1", job)
        cluster.command("scancel", "--signal=TERM", job)  # the ranks themselves
    left = marker(prepared / "slow")
    assert time.monotonic() - began > 60
    assert left["checkpoint"] == f"slow/checkpoint-{left['step']}"
    cluster.wait(job, "COMPLETED")
    assert "not requeued after SIGTERM" in told(prepared, "slow")

    cluster.wait(submit(cluster, prepared, "run.yaml", "slow"), "COMPLETED")
    assert_same_end(prepared / "slow", uninterrupted)


def test_a_run_that_fails_is_not_requeued(cluster: slurm.Slurm, prepared: Path) -> None:
    (prepared / "wrong.txt").write_text("lisa.num_sampled_layers=9\n")
    job = submit(cluster, prepared, "run.yaml", "failed", "--array=1", sweep="wrong.txt")
    hosts.wait_for(lambda: cluster.job(f"{job}_1")["JobState"] == "FAILED", 300, "it has not failed")
    assert cluster.job(f"{job}_1")["ExitCode"] == "2:0"
    assert "the model has 4 layers, got 9" in (prepared / "failed-1/logs/rank-0.log").read_text()


@pytest.fixture
def ssh(two_hosts: hosts.Hosts) -> Iterator[Path]:
    """sshd on both hosts, and a key that opens them; returns a hostfile."""
    folder = two_hosts.folder / "ssh"
    folder.mkdir()
    for key in ("user", "host"):
        two_hosts.run("n1", "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    for name, address in hosts.ADDRESSES.items():
        (folder / f"{name}.conf").write_text(
            f"ListenAddress {address}\nHostKey {folder}/host\nPidFile {folder}/{name}.pid\n"
            f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        )
        two_hosts.run(name, shutil.which("sshd", path="/usr/sbin:/usr/bin"), "-f", folder / f"{name}.conf")
    (two_hosts.folder / "ssh_config.d/lisa.conf").write_text(
        f"Host n1 n2\n IdentityFile {folder}/user\n StrictHostKeyChecking no\n"
        " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
    )
    (folder / "hostfile").write_text("n1 slots=1  # the first is where ranks meet\n\nn2 slots=1\n")
    yield folder / "hostfile"
    for name in hosts.NAMES:
        two_hosts.run(name, "kill", (folder / f"{name}.pid").read_text().strip(), check=False)


def test_hosts_of_a_file_train_the_same(two_hosts: hosts.Hosts, ssh: Path, prepared: Path, uninterrupted: Path) -> None:
    command = [ROOT / "launch/multinode.sh", ssh, "--lisa_config", "run.yaml", "training.output_dir=by_ssh"]
    more = {"TRAIN": str(ROOT / "launch/train.py"), "DEEPSPEED": "--master_port 29511"}
    env = environment(prepared, "", **{f"LISA_{name}": value for name, value in more.items()})
    del env["LISA_OUTPUT_DIR"]
    said = two_hosts.run("n1", *command, cwd=prepared, env=env, timeout_s=300)
    assert "n1: held-out loss" in said.replace("n1: n1:", "n1:")
    assert_same_end(prepared / "by_ssh", uninterrupted)

    hostfile = ssh.with_name("wrong")
    for lines, complaint in [
        ("n1 slots=1\nn3 slots=1\n", "n3: not reachable by ssh without a password"),
        ("n1 slots=1\nn2 slot=1\n", "line 2: should be 'name slots=N', got 'n2 slot=1'"),
        ("n1 slots=1\nn1 slots=1\n", "line 2: n1 is there twice"),
        ("# nobody\n", "names no host"),
    ]:
        hostfile.write_text(lines)
        said = two_hosts.run("n1", command[0], hostfile, *command[2:], cwd=prepared, env=env, check=False)
        assert f"multinode.sh: error: {hostfile}: {complaint}" in said
