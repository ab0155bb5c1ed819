"""`lisa-ds train`: what it starts, and that signals and a closed pipe end a run in good order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lisa_ds.cli import main
from lisa_ds.cluster.preemption import MARKER
from lisa_ds.errors import ConfigError, LisaError
from lisa_ds.train.launcher import Where, options
from lisa_ds.train.remote import check_hosts, exports
from tests.training_runs import write_run

LISA_DS = [sys.executable, "-m", "lisa_ds.cli"]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        **{"LISA_DS_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        **{"LISA_DS_PEAK_TFLOPS": "0.01", "PYTHONUNBUFFERED": "1"},
    }
    return subprocess.Popen(
        [*LISA_DS, "train", "run.yaml", "training.report_to=none", *more],
        **{"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )


def read_until(started: subprocess.Popen[str], text: str) -> str:
    assert started.stdout is not None
    said = ""
    while text not in said:
        line = started.stdout.readline()
        assert line, said + started.communicate()[1]
        said += line
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("launcher"))


LONG = ("training.max_steps=3000", "training.save_steps=9000", "data.eval_fraction=0", "--num-gpus", "2")


@pytest.mark.nightly
@pytest.mark.multirank
def test_a_signal_or_a_closed_pipe_has_the_run_save_and_leave(folder: Path) -> None:
    started = start(folder, *LONG)
    said = read_until(started, "  loss ")
    assert "no GPU here: 2 ranks on the CPU\n$ deepspeed " in said
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, out + err
    assert "lisa-ds: SIGTERM: the run saves after its step and ends; once more ends it at once\n" in err
    assert "go on with --resume auto" in out
    first = json.loads((folder / "out" / MARKER).read_text())
    assert first["checkpoint"] == f"out/checkpoint-{first['step']}"
    assert (folder / first["checkpoint"] / "trainer_state.json").exists()

    started = start(folder, *LONG, "--resume", "auto")
    read_until(started, "  loss ")
    assert started.stdout is not None
    assert started.stderr is not None
    started.stdout.close()
    err = started.stderr.read()
    assert started.wait(timeout=300) == 141
    assert "Traceback" not in err
    second = json.loads((folder / "out" / MARKER).read_text())
    assert second["step"] > first["step"]


@pytest.mark.nightly
@pytest.mark.multirank
def test_ctrl_c_saves_too_and_is_130(folder: Path) -> None:
    started = start(folder, *LONG[:-2], "training.output_dir=interrupted")
    said = read_until(started, "  loss ")
    assert "no GPU here: 1 rank on the CPU; --num-gpus 2 starts two\n" in said
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=300)
    assert (started.returncode, "Traceback" in err) == (130, False), out + err
    assert (folder / "interrupted" / MARKER).exists()


def test_a_second_ctrl_c_ends_it_at_once(folder: Path) -> None:
    started = start(folder, *LONG)
    read_until(started, "$ deepspeed ")
    started.send_signal(signal.SIGINT)
    assert started.stderr is not None
    started.send_signal(signal.SIGINT)  # as `timeout` does: no second one
    assert started.stderr.readline().startswith("lisa-ds: SIGINT: the run saves")
    assert started.poll() is None
    time.sleep(1.2)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=20)
    assert (started.returncode, err) == (130, "")


@pytest.mark.nightly
@pytest.mark.multirank
def test_a_rank_that_stops_amid_training_is_named_and_the_run_goes_on_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISA_DS_WATCH_S", "3")
    short = ("training.max_steps=100", *LONG[1:])
    started = start(folder, *short, "training.output_dir=stopped")

    def end_all() -> None:
        if started.poll() is None:
            for process in (*psutil.Process(started.pid).children(recursive=True), started):
                process.kill()

    limit = threading.Timer(300, end_all)  # a rank that is stopped and that nobody names would stay so
    limit.start()
    try:
        read_until(started, "  loss ")
        (second,) = [
            child
            for child in psutil.Process(started.pid).children(recursive=True)
            if "--local_rank=1" in child.cmdline()
        ]
        second.suspend()
        begin = time.monotonic()
        assert started.stderr is not None
        told = next(line for line in started.stderr if " is stopped, " in line)
        assert 3 <= time.monotonic() - begin < 10
        assert re.fullmatch(
            rf"\[rank 0\] rank 1 \(\S+, pid {second.pid}\) is stopped, last heard \d+ s ago: step \d+, training\. "
            r"rank 0 waits for it, step \d+, training, at \S+:\d+ \S+\n",
            told,
        ), told
        second.resume()
        out, err = started.communicate(timeout=300)
        assert started.returncode == 0, err
        assert "step 100/100" in out
    finally:
        limit.cancel()
        end_all()
        started.communicate()


@pytest.mark.multirank
@pytest.mark.more
def test_an_error_of_the_ranks_is_told_once_with_their_exit_code(folder: Path) -> None:
    started = start(folder, "data.path=/absent/file", "training.output_dir=other", "--num_gpus=2")
    out, err = started.communicate(timeout=300)
    assert started.returncode == 2
    assert [line for line in err.splitlines() if "error" in line] == [
        f"[rank 0] error: command line: data.path: no such file or directory: /absent/file (looked from {folder}); "
        "there is no directory /absent"
    ], out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "train: name the FILE of a run; `lisa-ds init` writes one, `lisa-ds recipes` has some\n"),
        (["none.yaml"], "none.yaml: no such file (looked from "),
        (["run.yaml", "lisa.sed=3"], "command line: lisa.sed: unknown key, got 3; did you mean 'lisa.seed'?\n"),
        (["run.yaml", "--num-gpus", "0"], "argument --num-gpus: should be a whole number, 1 or more, got '0'; see "),
        (
            ["run.yaml", "--num_nodes=2"],
            "--num-nodes and --master-addr: several hosts are named by a file, --hostfile\n",
        ),
        (
            ["run.yaml", "--hostfile", "none"],
            "--hostfile: none cannot be read: No such file or directory (looked from ",
        ),
        (
            ["run.yaml", "--hostfile", "wrong"],
            "wrong:1: should be a host and its ranks, as in 'gpu1 slots=8', got 'gpu1 8'\n",
        ),
        (["run.yaml", "--hostfile", "empty"], "--hostfile: empty names no host\n"),
        (
            ["--lisa-config", "run.yaml", "other.yaml"],
            "command line: should be key=value with a dotted key, got 'other.yaml' ",
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    Path("wrong").write_text("gpu1 8\n")
    Path("empty").write_text("# none\n")
    before = sorted(folder.rglob("*"))
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lisa-ds: error: {message}"), err
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_host_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("no-such-host.invalid slots=2\n")
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        LisaError, match=r"no-such-host.invalid is not reachable by ssh without a password; try: ssh -n "
    ):
        check_hosts(tmp_path / "hosts")
    (tmp_path / "ssh").unlink()
    with pytest.raises(LisaError, match="the launcher needs ssh, which is not installed on this host"):
        check_hosts(tmp_path / "hosts")


def test_other_hosts_are_told_of_caches_and_keys_and_of_nothing_that_breaks_a_shell() -> None:
    environ = {
        "HF_HOME": "/data/hf",
        "HOME": "/root",
        "MY_PROXY": "a b",
        "WANDB_MODE": "offline",
        "DS_ENV_FILE": "x",
        "NOT_HF_X": "1",
    }
    assert list(exports(environ)) == ["HF_HOME=/data/hf", "WANDB_MODE=offline"]
    assert "MY_PROXY=a b" in list(exports(environ | {"LISA_ENV": "MY_PROXY OTHER"}))
    with pytest.raises(
        LisaError, match="HF_TOKEN: cannot be passed on to other hosts: it has quotes, dollars or line ends"
    ):
        list(exports({"HF_TOKEN": "a$b"}))
    assert list(exports({"HOSTNAME": "a$b"})) == []


@pytest.mark.parametrize(
    ("where", "devices", "environ", "chosen"),
    [
        ({}, 0, {}, "--master_port 7 --num_gpus 1"),
        ({"num_gpus": 3}, 0, {}, "--master_port 7 --num_gpus 3"),
        ({}, 4, {}, "--master_port 7"),
        ({}, 2, {"CUDA_VISIBLE_DEVICES": "2,3"}, "--master_port 7"),
        ({"num_gpus": 2}, 4, {}, "--master_port 7 --num_gpus 2"),
        ({"num_gpus": 1}, 2, {"CUDA_VISIBLE_DEVICES": "2,3"}, "--master_port 7 --include localhost:2"),
        ({"hostfile": Path("hosts"), "num_nodes": 2}, 0, {}, "--hostfile hosts --num_nodes 2 --master_port 7"),
    ],
)
def test_what_the_launcher_is_told(where: dict[str, Any], devices: int, environ: dict[str, str], chosen: str) -> None:
    assert options(Where(**where, master_port=7), devices, environ)[2:] == chosen.split()


@pytest.mark.parametrize(
    ("where", "devices", "environ", "message"),
    [
        (
            {},
            1,
            {"CUDA_VISIBLE_DEVICES": "GPU-3"},
            "CUDA_VISIBLE_DEVICES: DeepSpeed's launcher takes numbers, got 'GPU-3'; ",
        ),
        ({"num_gpus": 4}, 2, {}, "--num-gpus: there are 2 here, got 4"),
        (
            {},
            0,
            {"WORLD_SIZE": "2"},
            "train: starts all ranks by itself, and is started 2 times here; have the launcher ",
        ),
        (
            {},
            0,
            {"SLURM_STEP_NUM_TASKS": "8"},
            "train: starts all ranks by itself, and is started 8 times here; have the ",
        ),
        (
            {"master_addr": "gpu1"},
            0,
            {},
            "--num-nodes and --master-addr: several hosts are named by a file, --hostfile",
        ),
    ],
)
def test_what_cannot_be_started(where: dict[str, Any], devices: int, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(Where(**where), devices, environ)
    assert str(caught.value).startswith(message)
