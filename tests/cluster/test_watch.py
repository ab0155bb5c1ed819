"""Ranks that stop, lag, die or fail are named by the others, on real ranks."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lisa_ds.cluster import watch
from lisa_ds.cluster.environment import free_port
from lisa_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
RANKS, PATIENCE = 3, 4.0

BODY = """
import os, sys, time, torch, torch.distributed as dist
from datetime import timedelta
from lisa_ds.cluster import watch
from lisa_ds.errors import DataError

rank, fault = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", timeout=timedelta(seconds=120))
watch.END_S = 2.0
state = {"step": 0, "phase": "training"}

def collate():
    if fault == "slow" and state["step"] == 3 and rank == 1:
        time.sleep(14)
    if fault == "data" and state["step"] == 3 and rank == 2:
        raise DataError("rows.jsonl:7: no such column")
    if fault == "disk" and state["step"] == 3 and rank == 0:
        raise OSError(28, "No space left on device")

def evaluate():
    state["phase"] = "evaluating"
    if fault == "evaluation" and rank == 0:
        time.sleep(14)
    dist.all_reduce(torch.ones(1))
    state["phase"] = "training"

watched = watch.Watch(lambda: (f"step {state['step']}, {state['phase']}", state["step"]), float(os.environ["PATIENCE"]))
with watched.watching():
    for state["step"] in range(1, 6):
        state["phase"] = "waiting for data"
        collate()
        state["phase"] = "training"
        if fault in ("stopped", "dead") and state["step"] == 3:
            print("ready", flush=True)
            if rank == 1:
                time.sleep(1000)
        dist.all_reduce(torch.ones(1))
        if state["step"] == 3:
            evaluate()
print("done", flush=True)
os._exit(0)
"""


def start(folder: Path, fault: str, port: int) -> list[subprocess.Popen[str]]:
    folder.mkdir()
    (folder / "body.py").write_text(BODY)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATIENCE": str(PATIENCE)}
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "body.py"), fault],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=(folder / f"{rank}.err").open("w"),
            text=True,
        )
        for rank in range(RANKS)
    ]


EXPECTED = {
    # fault: who tells, what; and the exit codes
    "stopped": (
        0,
        r"rank 1 \(\S+, pid \d+\) is stopped, last heard \d+ s ago: step 3, training\. ranks 0, 2 wait for it",
    ),
    "dead": (0, r"rank 1 \(\S+, pid \d+\) is dead"),
    "slow": (
        0,
        r"rank 1 \(\S+, pid \d+\) has been where it is for \d+ s: step 3, waiting for data, at body.py:\d+ collate\. "
        r"ranks 0, 2 wait for it, step 3, training, at ",
    ),
    "evaluation": (
        1,
        r"rank 0 \(\S+, pid \d+\) has been where it is for \d+ s: step 3, evaluating, at body.py:\d+ evaluate\. "
        r"ranks 1-2 wait for it, step 3, evaluating, at ",
    ),
    "data": (0, r"ends, as rank 2 \(\S+, pid \d+\) failed: rows.jsonl:7: no such column"),
    "disk": (1, r"ends, as rank 0 \(\S+, pid \d+\) failed: OSError: \[Errno 28\] No space left on device"),
}


@pytest.mark.more
@pytest.mark.multirank
def test_a_rank_that_is_waited_for_is_named_by_the_others(tmp_path: Path) -> None:
    places = {fault: tmp_path / fault for fault in EXPECTED}  # all at once: most of it is waiting
    runs = {fault: start(place, fault, free_port()) for fault, place in places.items()}
    try:
        for fault, sent in (("stopped", signal.SIGSTOP), ("dead", signal.SIGKILL)):
            for rank in runs[fault]:
                assert rank.stdout is not None
                assert rank.stdout.readline() == "ready\n"
            time.sleep(1.5)  # it has said where it is
            runs[fault][1].send_signal(sent)
        deadline = time.monotonic() + 100
        for fault, (teller, told) in EXPECTED.items():
            while not re.search(told, (text := texts(places[fault]))[teller]):
                assert time.monotonic() < deadline, (fault, text)
                time.sleep(0.2)
        for fault in ("slow", "evaluation"):  # nobody is ended, and it is told once each time, after 4 s and 8
            assert [rank.wait(60) for rank in runs[fault]] == [0] * RANKS
            assert len(re.findall(EXPECTED[fault][1], "".join(texts(places[fault])))) in (1, 2), texts(places[fault])
        assert all(rank.wait(60) for rank in runs["data"])
        assert all(rank.wait(60) for rank in runs["disk"])
    finally:
        for rank in itertools.chain.from_iterable(runs.values()):
            rank.send_signal(signal.SIGCONT)
            rank.kill()
            rank.wait()


def texts(place: Path) -> list[str]:
    """What each rank has said."""
    return [(place / f"{rank}.err").read_text() for rank in range(RANKS)]


def test_patience_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISA_DS_WATCH_S", raising=False)
    assert watch.patience() == watch.PATIENCE_S
    monkeypatch.setenv("LISA_DS_WATCH_S", "0")
    assert watch.patience() == 0
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("LISA_DS_WATCH_S", wrong)
        with pytest.raises(ConfigError) as error:
            watch.patience()
        assert str(error.value) == (
            f"environment: LISA_DS_WATCH_S: should be a number of seconds, or 0 not to watch, got {wrong!r}"
        )
