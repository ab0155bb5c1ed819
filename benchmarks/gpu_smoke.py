"""Stage a of the GPU proof: the kernels' numerics and speed, by the tests of tests/test_gpu.py, and compute-sanitizer on a case.

A test function is a claim: held if all its cases passed, missed if one failed, not run if none ran.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not

from benchmarks.gpu_claims import Claim, Report, at_most

ROOT = Path(__file__).resolve().parent.parent

TESTS = ROOT / "tests" / "test_gpu.py"
SANITIZED = ("triton", "cuda")


def _functions() -> dict[str, str]:
    """Tests that are not slow, by name, in words."""
    found = {}
    for node in ast.parse(TESTS.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [ast.unparse(decorator) for decorator in node.decorator_list]
            if "pytest.mark.slow" not in marks:
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
    results = report.path.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", str(TESTS), "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if dry_run else [f"--junitxml={results}", "--maxfail=40"]
    start = time.monotonic()
    run = subprocess.run(command, cwd=ROOT, timeout=max(deadline - start, 10))
    if dry_run:
        report.write("collected", "tests/test_gpu.py", int(run.returncode == 0), "exit code is 0")
        return
    counts: dict[str, Counter[str]] = {name: Counter() for name in FUNCTIONS}
    skipped = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = str(case.get("name")).partition("[")[0]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[name][outcome] += 1
        if outcome == "skipped":
            skipped[str(case.get("name"))] = str(next(iter(case)).get("message"))
    results.unlink()
    for name, count in counts.items():
        if count["passed"] or count["failed"]:
            report.judge(OF_TESTS[name], count["failed"], "failures", **count)
    report.write("seconds", "tests/test_gpu.py", time.monotonic() - start, "s", skipped=skipped)


def _sanitize(report: Report, backend: str, deadline: float) -> None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if sanitizer is None:
        print("  compute-sanitizer was not found; it comes with the CUDA toolkit")
        return
    command = [sanitizer, "--tool", "memcheck", "--padding", "16384", "--error-exitcode", "86"]
    command += [sys.executable, "-m", "tests.gpu_runs", backend, "--modes", "mixed"]
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
