"""Fine-tune a small language model by LISA on all GPUs, or on two CPU ranks, and ask it something before and after.

All that takes long happens in other processes, so that this one can say at any time how far they are.
"""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = "runs/demo"
PROMPT = "What does `math.gcd(a, b)` do in Python?"
LOOK = "from torch import cuda; print(cuda.device_count(), cuda.is_available() and cuda.is_bf16_supported())"
LISA_DS = [sys.executable, "-m", "lisa_ds.cli"]
STAMP = "[{:4.0f} s] "


def main() -> int:
    narrator = Narrator()
    signal.signal(signal.SIGINT, narrator.hear)
    num_gpus, bf16 = narrator.run("looking for GPUs", [sys.executable, "-c", LOOK]).split()
    on_gpus = num_gpus != "0"
    if not on_gpus:
        bf16 = str(cpu_is_fast_in_bf16())
    run = ["train", "configs/demo.yaml", *([] if on_gpus else ["--num-gpus", "2"])]
    run += [f"training.output_dir={OUTPUT}", f"training.bf16={bf16.lower()}"]
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    narrator.say(f"$ lisa-ds {' '.join(run)}")
    narrator.run("fine-tuning", [*LISA_DS, *run], show=True)
    place = ROOT / OUTPUT
    (place / "prompts.txt").write_text(PROMPT)
    ask = ["evaluate", OUTPUT, "--samples", f"{OUTPUT}/prompts.txt", "--max-new-tokens", "60"]
    narrator.say(f"$ lisa-ds {' '.join(ask)}")
    # One thread is enough, and is not slowed down by what else the machine does, as threads that wait for each other are.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    narrator.run("asking the model before and after training", [*LISA_DS, *ask], show=True, OMP_NUM_THREADS=threads)
    said = json.loads((place / "samples.jsonl").read_text(encoding="utf-8"))
    print(f"\n{PROMPT}")
    for when in ("before", "after"):
        print(f"\n{when} training:")
        for line in filter(str.strip, said[when].splitlines()):
            print(textwrap.fill(line, narrator.width, initial_indent="> ", subsequent_indent="> "))
    return 0


class Narrator:
    """Runs other processes and shows what they do, each line with the seconds since the start."""

    def __init__(self) -> None:
        self.start = self.spoke = time.monotonic()
        self.on_terminal = sys.stdout.isatty()
        self.beat_s = 1.0 if self.on_terminal else 3.0  # after so long without a line there is one that says how long
        self.width = min(100, shutil.get_terminal_size((100, 40)).columns)
        self.indent = len(STAMP.format(0))
        self.interrupted = False

    def hear(self, *_: object) -> None:
        """Ctrl-C: the process at work hears it as well, and ends; one that was only just starting may not have."""
        self.interrupted = True

    def say(self, text: str) -> None:
        """Print a line; on a terminal in the place of the last beat."""
        stamp = STAMP.format(time.monotonic() - self.start)
        lines = textwrap.wrap(text, self.width - 1, initial_indent=stamp, subsequent_indent=" " * self.indent)
        print("\r\033[K" if self.on_terminal else "", "\n".join(lines), sep="", flush=True)
        self.spoke = time.monotonic()

    def beat(self, what: str, seconds: float) -> None:
        """Say that ``what`` goes on."""
        stamp, tail = STAMP.format(time.monotonic() - self.start), f": {seconds:.0f} s"
        text = stamp + textwrap.shorten(what, self.width - 1 - self.indent - len(tail), placeholder="...") + tail
        print(f"\r\033[K{text}" if self.on_terminal else f"{text}\n", end="", flush=True)
        self.spoke = time.monotonic()

    def run(self, what: str, command: list[str], show: bool = False, **variables: str) -> str:
        """Run a command in the repository's root, and return what it writes to stdout.

        What it writes to stderr is shown, with ``show`` all of it; a line that ends in ``...`` says what takes place from
        then on. Exits with the command's exit code if that is not 0.
        """
        self.say(f"{what} ...")
        columns = str(self.width - 1 - self.indent)  # there is a stamp before each line
        environment = {**os.environ, **variables, "COLUMNS": columns}
        with tempfile.TemporaryFile("w+") as answer:
            output, error = (subprocess.PIPE, subprocess.STDOUT) if show else (answer, subprocess.PIPE)
            with subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=error, text=True
            ) as process:
                told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
                threading.Thread(target=_tell, args=(process, told), daemon=True).start()
                since, stage = time.monotonic(), what
                while True:
                    try:
                        line = told.get(timeout=max(0.0, self.spoke + self.beat_s - time.monotonic()))
                    except queue.Empty:
                        self.beat(stage, time.monotonic() - since)
                        continue
                    if line is None:
                        break
                    if line:
                        self.say(line)
                        since, stage = time.monotonic(), line.removesuffix(" ...") if line.endswith(" ...") else what
            if code := process.returncode or 130 * self.interrupted:
                sys.exit(code if code > 0 else 128 - code)
            answer.seek(0)
            return answer.read()


def _tell(process: "subprocess.Popen[str]", told: "queue.SimpleQueue[str | None]") -> None:
    """Its lines, and None when it has ended."""
    stream = process.stdout or process.stderr
    assert stream is not None
    for line in stream:
        told.put(line.rstrip())
    process.wait()
    told.put(None)


def cpu_is_fast_in_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; one that has to emulate it is faster in fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


if __name__ == "__main__":
    sys.exit(main())
