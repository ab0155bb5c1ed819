"""Stage a of the GPU proof: the kernels' numerics and speed, by the tests of tests/gpu/test_gpu.py, and compute-sanitizer on a case.

A test function is a claim: held if all its cases passed, missed if one failed, not run if none ran.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not

from benchmarks.gpu_claims import Claim, Report, at_most

ROOT = Path(__file__).resolve().parent.parent

TESTS = ROOT / "tests/gpu/test_gpu.py"
_OUTCOME = re.compile(r"::(test_\w+)(\[.*\])? (PASSED|FAILED|SKIPPED|ERROR)", re.MULTILINE)
SANITIZED = ("triton", "cuda")


def _functions() -> dict[str, str]:
    """Tests that are not nightly, by name, in words."""
    found = {}
    for node in ast.parse(TESTS.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [ast.unparse(decorator) for decorator in node.decorator_list]
            if "pytest.mark.nightly" not in marks:
                found[node.name] = node.name.removeprefix("test_").replace("_", " ")
    return found


FUNCTIONS = _functions()
OF_TESTS = {name: at_most("a", text, 0, "failures") for name, text in FUNCTIONS.items()}
OF_SANITIZER = {
    backend: at_most("a", f"compute-sanitizer finds nothing in the {backend} kernels (mixed)", 0, "findings")
    for backend in SANITIZED
}
CLAIMS: list[Claim] = [*OF_TESTS.values(), *OF_SANITIZER.values()]


def main() -> None:
    """Run the tests, then the sanitizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="collect the tests; run none")
    parser.add_argument("--limit-s", type=float, default=120)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.limit_s
    report = Report(arguments.out, "a", dry_run=arguments.dry_run)
    with report.part("tests"):
        _run_tests(report, deadline - 25, arguments.dry_run)
    for backend in SANITIZED:
        with report.part(f"compute-sanitizer on {backend}"):
            _sanitize(report, backend, deadline)


def _run_tests(report: Report, deadline: float, dry_run: bool) -> None:
    log = report.path.with_suffix(".log")
    command = [sys.executable, "-m", "pytest", str(TESTS), "-m", "gpu and not nightly", "-v", "-p", "no:cacheprovider"]
    start = time.monotonic()
    with log.open("w") as file:
        if dry_run:
            code = subprocess.run([*command, "--collect-only"], cwd=ROOT, stdout=file).returncode
            report.write("collected", "tests/gpu/test_gpu.py", int(code == 0), "exit code is 0")
            if code:
                raise RuntimeError(f"exit code {code}: {log.read_text()[-2000:]}")
            return
        try:
            subprocess.run(command, cwd=ROOT, stdout=file, timeout=max(deadline - start, 10))
        except subprocess.TimeoutExpired:
            print("  ended at its limit: what ran until then counts")
    unfit = judge_tests(report, log.read_text())
    report.write("seconds", "tests/gpu/test_gpu.py", time.monotonic() - start, "s", unfit=unfit)


def judge_tests(report: Report, text: str) -> list[str]:
    """The verdicts on what pytest's verbose output tells of; returns the cases that did not pass."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in FUNCTIONS}
    unfit = []
    for name, case, outcome in _OUTCOME.findall(text):
        counts[name][outcome.lower()] += 1
        if outcome != "PASSED":
            unfit.append(f"{name}{case}: {outcome.lower()}")
    for name, count in counts.items():
        failures = count["failed"] + count["error"]
        if count["passed"] or failures:
            report.judge(OF_TESTS[name], failures, "failures", **count)
    return unfit


def _sanitize(report: Report, backend: str, deadline: float) -> None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if sanitizer is None:
        print("  compute-sanitizer was not found; it comes with the CUDA toolkit")
        return
    command = [sanitizer, "--tool", "memcheck", "--padding", "16384", "--error-exitcode", "86"]
    command += [sys.executable, "-m", "tests.gpu.gpu_runs", backend, "--modes", "mixed"]
    start = time.monotonic()
    # Without torch's cache every tensor is an allocation, and ends where it ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = max(deadline - start, 5)
    run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit)
    if run.returncode not in (0, 86) or (run.returncode == 0 and "all modes have run" not in run.stdout):
        raise RuntimeError(f"exit code {run.returncode}: {run.stdout[-2000:]}")
    report.judge(OF_SANITIZER[backend], run.returncode, "findings", seconds=time.monotonic() - start)


if __name__ == "__main__":
    main()
