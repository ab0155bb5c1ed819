"""compute-sanitizer finds no memory error in the compiled kernels, and sees one that is made on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lisa_ds.ops import Backend, build
from tests.gpu.gpu_cases import backend
from tests.ops import cuda_emulator

__all__ = ["backend"]

pytestmark = pytest.mark.gpu

FOUND = 86  # exit code of compute-sanitizer where it has found something


def sanitise(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found; it comes with the CUDA toolkit")
    options = {
        # Beyond what an unmasked read of a whole block of fp32 reaches, so that it meets no other tensor.
        "memcheck": ["--padding", "16384"],
        "racecheck": [],
        "initcheck": ["--kernel-name", "kernel_substring=masked_adamw"],
    }
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *options[tool]]
    # Without torch's cache every tensor is an allocation, and ends where it ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, "-m", "tests.gpu.gpu_runs", *arguments]
    folder = Path(__file__).resolve().parents[2]
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200
    )


@pytest.mark.nightly
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(backend: Backend, tool: str) -> None:
    run = sanitise(tool, backend)
    assert run.returncode == 0, run.stdout[-5000:]
    assert "all modes have run" in run.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("where", cuda_emulator.DROPPED_MASK)
def test_compute_sanitizer_sees_a_dropped_mask_in_cuda(tmp_path: Path, where: str) -> None:
    """Control: what it reads behind the end changes no result."""
    if (reason := build.unbuildable("cuda")) is not None:
        pytest.skip(reason)
    old, new = cuda_emulator.DROPPED_MASK[where]
    text = cuda_emulator.source()
    assert text.count(old) == 1
    (tmp_path / "mutant.cu").write_text(text.replace(old, new))
    flags = ["-O3", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    subprocess.run([str(build.compiler("cuda")), *flags, "-o", "mutant.so", "mutant.cu"], cwd=tmp_path, check=True)
    run = sanitise("memcheck", "cuda", str(tmp_path / "mutant.so"))
    assert run.returncode == FOUND, run.stdout[-5000:]
    assert "Invalid __global__ read" in run.stdout


@pytest.mark.nightly
def test_compute_sanitizer_sees_a_dropped_mask_in_triton(tmp_path: Path) -> None:
    """Control, likewise."""
    from lisa_ds.ops import triton as room

    text = Path(room.__file__).read_text()
    masked = "tl.load(at, mask=i < left, other=0)"
    assert text.count(masked) == 1
    (tmp_path / "mutant.py").write_text(text.replace(masked, "tl.load(at)"))
    run = sanitise("memcheck", "triton", str(tmp_path / "mutant.py"))
    assert run.returncode == FOUND, run.stdout[-5000:]
    assert "Invalid __global__ read" in run.stdout
