"""``make demo``: never silent for long, and a difference to be seen at its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.train.builtin import smollm2 as smollm2_directory

ROOT = Path(__file__).parents[2]
LONGEST_SILENCE_S = 5.0


def timed(command: list[str], **environment: str) -> tuple[int, list[tuple[float, str]]]:
    """A command's exit code, and the lines of its output with the seconds since its start."""
    start = time.monotonic()
    env = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = [(time.monotonic() - start, line.rstrip("\n")) for line in process.stdout]
    return process.returncode, [*lines, (time.monotonic() - start, "")]


def silences(lines: list[tuple[float, str]]) -> Iterator[float]:
    before = 0.0
    for now, _ in lines:
        yield now - before
        before = now


SILENT = {
    "at all": "import time; time.sleep(7)",
    "after a stage": "import time; print('loading it ...', flush=True); time.sleep(7); print('done')",
    "amid a line": "import time; print('half a line', end='', flush=True); time.sleep(7)",
    "with empty lines": "import time; [(time.sleep(1), print(flush=True)) for _ in range(7)]",
    "for good": "import os, time; os.close(1); os.close(2); time.sleep(7)",
}


@pytest.fixture(scope="module")
def narrated() -> dict[str, tuple[int, list[tuple[float, str]]]]:
    """What is seen of processes that say nothing for 7 s; all at once."""
    run = "from launch import demo; demo.Narrator().run('sleeping', [demo.sys.executable, '-c', {!r}], show=True)"
    commands = {name: [sys.executable, "-c", run.format(code)] for name, code in SILENT.items()}
    commands["make"] = ["make", "-s", "--eval", "x: ; @$(TOLD) sleep 7", "x"]
    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(timed, commands.values()), strict=True))


@pytest.mark.parametrize("kind", [*SILENT, "make"])
def test_there_is_a_sign_of_life_whatever_a_process_does(narrated: Any, kind: str) -> None:
    returncode, lines = narrated[kind]
    assert returncode == 0, lines
    assert lines[-1][0] >= 7
    assert max(silences(lines)) < LONGEST_SILENCE_S, lines


def test_a_stage_is_named_while_it_lasts(narrated: Any) -> None:
    texts = [text.partition("] ")[2] for _, text in narrated["after a stage"][1]]
    assert texts[:2] == ["sleeping ...", "loading it ..."]
    assert texts[2] in ("loading it: 3 s", "loading it: 4 s")
    assert texts[-2] == "done"


def test_a_failure_is_shown_and_has_its_exit_code() -> None:
    code = "import sys; print('no answer'); print('why', file=sys.stderr); sys.exit(3)"
    run = (
        f"from launch import demo; demo.Narrator().run('asking', [demo.sys.executable, '-c', {code!r}]); print('more')"
    )
    returncode, lines = timed([sys.executable, "-c", run])
    assert returncode == 3
    assert [text.partition("] ")[2] for _, text in lines] == ["asking ...", "why", ""]
    returncode, lines = timed(["make", "-s", "--eval", "x: ; @$(TOLD) sh -c 'exit 3'", "x"])
    assert returncode == 2  # make's own
    assert any("Error 3" in text for _, text in lines)


def test_nothing_is_installed_in_silence() -> None:
    done = subprocess.run(["make", "-n", "-B", ".venv/installed"], cwd=ROOT, capture_output=True, text=True, check=True)
    long = [line for line in done.stdout.splitlines() if "pip install" in line or "-m venv" in line]
    assert len(long) == 4
    assert all("' told " in line for line in long), long


def test_ctrl_c_ends_it_without_a_traceback() -> None:
    command = [sys.executable, "-u", "launch/demo.py"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(0.5)  # until the process at work is one of Python's
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert "looking for GPUs ..." in first
    assert process.returncode == 130, rest
    assert "demo.py" not in rest


@pytest.mark.nightly
@pytest.mark.multirank
def test_the_demo_is_never_silent_and_shows_a_difference(tmp_path: Path) -> None:
    smollm2_directory()
    place = ROOT / "runs/demo"
    before = place.stat().st_mtime if place.exists() else 0.0
    cache = {"LISA_DS_CACHE": str(tmp_path / "cache"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    returncode, lines = timed(
        [sys.executable, "launch/demo.py"], DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", **cache
    )
    texts = [text for _, text in lines]
    assert returncode == 0, texts
    assert place.stat().st_mtime > before
    assert max(silences(lines)) < LONGEST_SILENCE_S, lines
    assert max(map(len, texts)) <= 100
    end = texts.index("What does `math.gcd(a, b)` do in Python?")
    untrained, trained = texts[end:].index("before training:"), texts[end:].index("after training:")
    assert texts[end + untrained + 1].startswith("> ")
    assert texts[end + trained + 1].startswith("> Return the greatest common divisor")
    assert texts[end + untrained + 1] != texts[end + trained + 1]
