"""Run files spoiled at random: each is planned, checked or refused in a line, in time, and nothing is written when it is refused."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.cli import main
from lisa_ds.cluster.environment import free_port
from lisa_ds.config import load_config
from lisa_ds.errors import LisaError
from lisa_ds.train import arguments, checks
from tests import tiny
from tests.config import config_fuzz
from tests.training_runs import launch

MOST_CPU_SECONDS, MOST_SECONDS = 20, 300
"""Of computing, and of waiting: others may keep the machine busy."""

LONGEST_MESSAGE = 6000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a model and rows, on one rank of this process; the hub is not asked."""
    import deepspeed
    import torch.distributed as dist
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.alpaca)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it has read its environment already
    variables = {"LISA_DS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    # TrainingArguments have made this process a rank: other tests begin without one.
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    deepspeed.comm.comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()


class Late(BaseException):
    """Of no kind that anything catches."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Late

    timers = {
        signal.SIGALRM: (signal.ITIMER_REAL, MOST_SECONDS),
        signal.SIGPROF: (signal.ITIMER_PROF, MOST_CPU_SECONDS),
    }
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


class Hunt:
    """Counts what becomes of each stage, and keeps what should not be."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bad: list[str] = []

    def attempt(self, stage: str, what: str, call: Callable[[], Any]) -> Any:
        said = io.StringIO()
        try:
            with in_time(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                result = call()
            self.counts[stage, "passed"] += 1
            return result
        except LisaError as error:
            self.counts[stage, "refused"] += 1
            if not str(error).strip() or len(str(error).encode()) > LONGEST_MESSAGE:
                self.bad.append(f"{stage}: {what}: a message of {len(str(error))} characters: {str(error)[:200]}")
        except BaseException as error:
            self.counts[stage, "failed"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.bad.append(
                f"{stage}: {what}: {type(error).__name__} at {last.filename}:{last.lineno}: {str(error)[:200]}"
            )
        return None

    def through(self, what: str, overrides: list[str]) -> None:
        """`run.yaml` through all that is done before weights are loaded."""
        config = self.attempt("load", what, lambda: load_config("run.yaml", overrides))
        command = ["plan", "--lisa_config", "run.yaml", "--world-size", "2", "--gpu-memory", "8GB", *overrides]
        self.attempt("plan", what, lambda: main(command))
        if config is None or config.model.name_or_path.startswith("builtin:"):  # which would be converted
            return
        checked = self.attempt("checks", what, lambda: checks.check(config))
        if checked is not None:
            self.attempt("build", what, lambda: arguments.build(config, checked.given, resumed=False))


def hunt(folder: Path, seed: int, count: int) -> Hunt:
    found, rng = Hunt(), random.Random(seed)
    before = {*os.listdir(folder), "run.yaml", "cache"}
    for number in range(count):
        text, what = config_fuzz.spoiled(rng)
        overrides = config_fuzz.overrides(rng)
        (folder / "run.yaml").write_bytes(text)
        what = f"seed {seed}, number {number}: {what} {overrides}"
        found.through(what, overrides)
        if left := {*os.listdir(folder)} - before:
            found.bad.append(f"{what}: left {sorted(left)}")
            before |= left
    print(dict(found.counts))
    return found


def test_spoiled_runs_are_refused_in_a_line(folder: Path) -> None:
    found = hunt(folder, seed=5, count=60)
    assert found.bad == []
    for stage in ("load", "checks"):
        assert found.counts[stage, "refused"] > 5
    for stage in ("load", "plan", "checks", "build"):
        assert found.counts[stage, "passed"] > 0


def test_the_hunt_finds_what_it_hunts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a check that cannot bear a value is seen, and so is one that writes."""

    def careless(config: Any, **_: Any) -> Any:
        Path("out").mkdir(exist_ok=True)
        return config.training["max_steps"] + 1

    monkeypatch.setattr(checks, "check", careless)
    bad = hunt(folder, seed=0, count=30).bad
    assert any("TypeError" in each or "KeyError" in each for each in bad)
    assert any("left ['out']" in each for each in bad)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_spoiled_runs_are_refused_in_a_line(folder: Path, seed: int) -> None:
    assert hunt(folder, seed, count=int(os.environ.get("LISA_FUZZ_COUNT", "320"))).bad == []


@pytest.mark.nightly
@pytest.mark.multirank
@pytest.mark.parametrize("seed", range(5))
def test_spoiled_runs_under_the_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Two ranks by DeepSpeed's own launcher: it trains, or ends with exit code 2, without a traceback and with nothing written."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable)
    rng, ends = random.Random(1000 + seed), Counter[int]()
    for number in range(10):
        while b"builtin:" in (spoiled := config_fuzz.spoiled(rng))[0]:
            continue
        (folder / "run.yaml").write_bytes(spoiled[0])
        before = {*os.listdir(folder), "cache"}
        done = launch(folder, *config_fuzz.overrides(rng))
        what = f"seed {seed}, number {number}: {spoiled[1]}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        assert done.returncode in (0, 2), what
        assert "Traceback" not in done.stdout + done.stderr, what
        if done.returncode == 2:
            assert "error: " in done.stderr, what
            assert {*os.listdir(folder)} <= before, what
        ends[done.returncode] += 1
    print(dict(ends))
