"""`lisa-ds check` on real ranks: each fault is a real one, and its host is named in seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.cluster.cluster_jobs import ROOT, SEEN_S, Job, errors, free_port, mounted, needs_mounts, read_only, two_hosts

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> None:
    """On a fresh machine the first rank to load torch compiles it and reads it from a cold disk: longer than ranks may wait."""
    subprocess.run([sys.executable, "-c", "import torch.distributed, lisa_ds.cluster.check"], cwd=ROOT, check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with a model and data, that has never been started."""
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.alpaca)
    (tmp_path / "out").mkdir()
    (tmp_path / "cache").mkdir()
    run = {"model": {"name_or_path": "model"}, "data": {"path": "rows.jsonl"}, "training": {"output_dir": "out"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def test_ranks_that_fit_together(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    job = Job(folder, 3, "--lisa_config", "run.yaml", "training.output_dir=new/deep", "--json")
    done = job.start(0, "gpu1").start(1, "gpu1", LOCAL_RANK="1").start(2, "gpu2").end()
    assert [one.returncode for one in done] == [0, 0, 0], done
    assert [one.stdout for one in done[1:]] == ["", ""]
    report = json.loads(done[0].stdout)
    assert (report["ok"], report["errors"], report["notes"]) == (True, [], []), report
    assert {name: host["ranks"] for name, host in report["hosts"].items()} == {"gpu1": [0, 1], "gpu2": [2]}
    ahead, off = report["hosts"]["gpu2"]["clock"]
    assert abs(ahead) <= off + 0.001  # it is the same clock
    sizes = [size["bytes"] for size in report["all_reduce"]]
    assert sizes == [2**12, 2**20, 2**24][: max(1, len(sizes))]  # on a slow machine time is up before the larger ones
    assert report["backend"] == "gloo"
    for size in report["all_reduce"]:
        assert size["algorithm_gb_per_s"] == pytest.approx(size["bytes"] / size["seconds"] / 1e9)
        assert size["bus_gb_per_s"] == pytest.approx(size["algorithm_gb_per_s"] * 4 / 3)
    assert sorted(report["hosts"]["gpu2"]["disk_free"]) == ["cache", "output_dir"]
    assert sorted(folder.rglob("*")) == before


def test_a_host_alone_is_a_table(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lisa_ds.cli", "check"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        | {"PYTHONPATH": str(ROOT), "LISA_DS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=SEEN_S,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.splitlines()[0].split() == [
        "host",
        "ranks",
        "GPUs",
        "memory",
        "free",
        "disk",
        "free",
        "clock",
        "copy",
        "matmul",
    ]
    assert done.stdout.endswith("ok: 1 rank on 1 host\n")


@pytest.mark.parametrize(
    "known_by", ["hostfile", *(pytest.param(other, marks=pytest.mark.more) for other in ("Slurm", "nothing"))]
)
def test_a_rank_that_does_not_arrive_is_named(folder: Path, known_by: str) -> None:
    (folder / "hosts").write_text("# in the order of ranks\ngpu1 slots=2\ngpu7 slots=1\n")
    more = ["--hostfile", "hosts"] if known_by == "hostfile" else []
    slurm = {"SLURM_STEP_NODELIST": "gpu1,gpu7", "SLURM_STEP_TASKS_PER_NODE": "2,1"} if known_by == "Slurm" else {}
    start = time.monotonic()
    done = Job(folder, 3, "--timeout", "3", *more).start(0, "gpu1", **slurm).start(1, "gpu1", **slurm).end()
    assert time.monotonic() - start < 30
    assert [one.returncode for one in done] == [2, 2]
    who = "rank 2" if known_by == "nothing" else "gpu7 (rank 2)"
    assert errors(done[0]) == [f"{who}: did not arrive within 3 s; see whether it has started, and what it says"]
    assert "note: all-reduce was not tried: 1 of 3 ranks are missing" in done[0].stdout
    assert done[1].stderr == ""  # one message a job


@needs_mounts
def test_every_fault_of_a_host_is_told_at_once(folder: Path) -> None:
    """Another version, an unshared folder, another model and no data, all on one of three hosts."""
    fake = folder / "site/triton-9.9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 9.9.9\n")
    (folder / "data").mkdir()
    (folder / "rows.jsonl").rename(folder / "data/rows.jsonl")
    before = sorted(folder.rglob("*"))
    job = Job(folder, 3, "--lisa_config", "run.yaml", "data.path=data/rows.jsonl").start(0, "gpu1").start(1, "gpu2")
    hidden = mounted(*(f"mount -t tmpfs none {name}" for name in ("out", "cache", "model", "data")))
    job.start(2, "gpu7", *hidden, PYTHONPATH=f"{folder / 'site'}{os.pathsep}{ROOT}")
    done = job.end()
    assert [one.returncode for one in done] == [2, 2, 2]
    triton, output_dir, model, data = errors(done[0])
    assert triton.startswith("gpu7: triton is 9.9.9, but ")
    assert triton.endswith(" on gpu1, gpu2; install the same on all hosts, or use one shared environment")
    assert output_dir == (
        "gpu7: output_dir: out does not show what gpu1 has written there; "
        "mount it at that path on all hosts, or choose a folder on a shared file system"
    )
    assert model.startswith("gpu7: model: model holds other files than on gpu1, gpu2; ")
    assert data.startswith("gpu7: data: data/rows.jsonl does not exist; ")
    assert "warning: gpu7: cache: " in done[0].stdout
    assert sorted(folder.rglob("*")) == before


@needs_mounts
@pytest.mark.more
def test_a_folder_that_one_host_cannot_write_to(folder: Path) -> None:
    job = Job(folder, 2, "--lisa_config", "run.yaml").start(0, "gpu1")
    done = job.start(1, "gpu7", *mounted(*read_only("out"))).end()
    assert [one.returncode for one in done] == [2, 2]
    assert errors(done[0]) == [
        "gpu7: output_dir: out cannot be written to (Read-only file system); correct the path, or its permissions"
    ]


@pytest.mark.more
def test_a_folder_that_is_a_file(folder: Path) -> None:
    job = Job(folder, 2, "--lisa_config", "run.yaml", "training.output_dir=rows.jsonl/out")
    done = job.start(0, "gpu1").start(1, "gpu7").end()
    assert [one.returncode for one in done] == [2, 2]
    assert [line.partition(": output_dir: rows.jsonl/out cannot be made: ")[0] for line in errors(done[0])] == [
        "gpu1",
        "gpu7",
    ]


@needs_mounts
@pytest.mark.more
def test_a_file_system_that_hangs_does_not_hang_the_check(folder: Path) -> None:
    """A read of a pipe that nobody writes to ends as late as one of a server that is gone."""
    os.mkfifo(folder / "pipe")
    job = Job(folder, 2, "--lisa_config", "run.yaml", "--timeout", "10").start(0, "gpu1")
    done = job.start(1, "gpu7", *mounted("mount --bind pipe rows.jsonl")).end()
    assert [one.returncode for one in done] == [2, 2]
    assert errors(done[0]) == ["gpu7: a file system gives no answer within 10 s; see which of its file systems hangs"]
    assert sorted((folder / "out").iterdir()) == []


@pytest.mark.more
def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # takes connections and says nothing
        port = other.getsockname()[1]
        done = Job(folder, 2, "--timeout", "4", port=port).start(0, "gpu1").start(1, "gpu7").end()
    assert [one.returncode for one in done] == [2, 2]
    assert errors(done[0]) == [
        f"gpu1 (rank 0): another program listens at 127.0.0.1:{port} already; "
        "set MASTER_PORT (deepspeed: --master_port) to a free port"
    ]
    assert done[1].stderr.startswith(
        f"lisa-ds: error: gpu7 (rank 1): 127.0.0.1:{port} takes connections, but does not answer as rank 0's store; "
    )


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1", "nobody listens there"), ("no-such-host.invalid", "its name cannot be resolved")],
)
@pytest.mark.more
def test_a_rank_that_cannot_reach_the_master_says_from_where(folder: Path, address: str, reason: str) -> None:
    port = free_port()
    (done,) = Job(folder, 2, "--timeout", "2", port=port, address=address).start(1, "gpu7").end()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"lisa-ds: error: gpu7 (rank 1): cannot reach rank 0 at {address}:{port}: {reason}; ")


@pytest.mark.parametrize("fate", ["dies", pytest.param("hangs", marks=pytest.mark.nightly)])
@pytest.mark.more
def test_a_rank_0_that_is_gone_ends_the_others(folder: Path, fate: str) -> None:
    port = free_port()
    job = Job(folder, 3, "--timeout", "8", port=port).start(0, "gpu1").start(1, "gpu7")  # rank 0 waits for the third
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    time.sleep(2)  # for rank 1 to come
    job.signal(0, signal.SIGKILL if fate == "dies" else signal.SIGSTOP)
    done = job.end_of(1)
    assert done.returncode == 2
    assert re.match(
        r"lisa-ds: error: gpu7 \(rank 1\): (the connection to|cannot reach rank 0 at|rank 0 at|127.0.0.1:\d+ takes) ",
        done.stderr,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime (Debian: apt install faketime)")
@pytest.mark.parametrize(("offset", "told"), [("+5s", "5.0 s ahead of"), ("-100s", "100.0 s behind")])
def test_a_clock_that_is_off(folder: Path, offset: str, told: str) -> None:
    job = Job(folder, 2).start(0, "gpu1")
    done = job.start(1, "gpu7", "faketime", "-m", "-f", offset, FAKETIME_DONT_FAKE_MONOTONIC="1").end()
    text = f"gpu7: its clock is {told} gpu1's; start a time service there (chrony, ntpd)"
    if offset == "+5s":
        assert [one.returncode for one in done] == [0, 0], done
        assert f"warning: {text}" in done[0].stdout.splitlines()
    else:
        assert [one.returncode for one in done] == [2, 2]
        assert errors(done[0]) == [text]


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT", "-m", "lisa_ds.cli"],
        ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module", "lisa_ds.cli"],
        ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--no_python", "lisa-ds"],
    ],
    ids=["torchrun", "deepspeed --module", "deepspeed --no_python"],
)
@pytest.mark.more
def test_launchers(folder: Path, launcher: list[str]) -> None:
    port = str(free_port())
    done = subprocess.run(
        [sys.executable, "-m", *(port if word == "PORT" else word for word in launcher), "check", "--json"],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "LISA_DS_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu"}
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (report["ok"], report["world_size"]) == (True, 2)


@pytest.mark.cluster
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip (Debian: iproute2)")
@pytest.mark.parametrize("fault", ["none", "a firewall", "no route"])
def test_hosts_with_networks_of_their_own(folder: Path, fault: str) -> None:
    port = 29871
    if fault == "a firewall" and shutil.which("iptables") is None:
        pytest.skip("needs iptables")
    with two_hosts() as (names, address):
        enter = [
            ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh")
            for name in names
        ]
        if fault == "a firewall":  # that lets through what one opens for the master alone
            rule = ["-A", "INPUT", "-i", "eth0", "-p", "tcp", "--syn", "-j", "REJECT"]
            subprocess.run(["ip", "netns", "exec", names[1], "iptables", *rule], check=True, capture_output=True)
        elif fault == "no route":
            subprocess.run(["ip", "-n", names[1], "link", "set", "eth0", "down"], check=True)
        gloo = {"GLOO_SOCKET_IFNAME": "eth0", "SLURMD_NODENAME": ""}
        job = Job(folder, 2, "--lisa_config", "run.yaml", "--timeout", "6", port=port, address=address)
        done = job.start(0, "", *enter[0], **gloo).start(1, "", *enter[1], **gloo).end()
    if fault == "none":
        assert [one.returncode for one in done] == [0, 0], done
        assert "all-reduce of 2 ranks by gloo (bytes / time): 4 KiB " in done[0].stdout
        assert done[0].stdout.endswith("ok: 2 ranks on 2 hosts\n")
        return
    assert [one.returncode for one in done] == [2, 2]
    if fault == "a firewall":
        (told,) = errors(done[0])
        assert told.startswith("lisachk1: cannot connect to lisachk2 at 10.231.9.2:")
        assert "note: all-reduce was not tried: hosts cannot connect" in done[0].stdout
    else:
        assert errors(done[0])[0].startswith("rank 1: did not arrive within 6 s; ")
        assert "lisachk2 (rank 1): cannot reach rank 0 at 10.231.9.1:29871: Network is unreachable; " in done[1].stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "0"], "argument --timeout: should be seconds, more than 0 and at most 3600, got '0'"),
        (["lisa.seed=1"], "command line: 'lisa.seed=1' is a key of a run: give its file, --lisa_config"),
        (["--lisa_config", "no.yaml"], "no.yaml: no such file (looked from "),
    ],
)
def test_the_command_line_is_read_before_torch(tmp_path: Path, arguments: list[str], message: str) -> None:
    code = (
        "import sys; from lisa_ds.cli import main; rc = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(rc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith(f"lisa-ds: error: {message}")
