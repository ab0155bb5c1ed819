"""Compiling csrc/: once on a machine, ahead of time, and what happens where that cannot be."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lisa_ds import cli
from lisa_ds.ops import Hyper, SegmentTable, build, dispatch, masked_adamw_, segments
from tests.ops.adamw_cases import MODES, make_segment

ROOT = Path(__file__).resolve().parents[2]
COMPILER = build.unbuildable("cpu")
needs_compiler = pytest.mark.skipif(COMPILER is not None, reason=f"the CPU kernels cannot be built here: {COMPILER}")


def clear_caches() -> None:
    from lisa_ds.ops import cpu

    for cached in (cpu._load, dispatch.unavailable, dispatch.default_backend):
        cached.cache_clear()


@pytest.fixture
def afresh() -> object:
    """What is remembered of this machine is forgotten before and after."""
    clear_caches()
    yield
    clear_caches()


@needs_compiler
def test_ranks_that_start_together_compile_once(tmp_path: Path) -> None:
    code = "from lisa_ds.ops import cpu; print(cpu.available(), cpu.level())"
    environment = os.environ | {"LISA_DS_CACHE": str(tmp_path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [rank.communicate(timeout=300) for rank in ranks]
    assert all(re.fullmatch(r"None (avx512|avx2|base)\n", out) for out, _ in told), told
    said = "".join(err for _, err in told)
    assert said.count("compiling the cpu kernels, once on this machine") == 1
    assert re.search(r"compiled the cpu kernels in \d+ s", said)
    assert len(list((tmp_path / "ops").glob("cpu-*/*.so"))) == 1


@needs_compiler
@pytest.mark.parametrize("source", ["cpu/table.h", "cuda/masked_adamw.cu"])
def test_the_sources_have_the_sizes_and_the_columns_of_the_tables(source: str) -> None:
    text = (ROOT / "csrc" / source).read_text()
    sizes = dict(re.findall(r"constexpr (?:int|int64_t) (k\w*(?:Block|Columns)) = (\d+);", text))
    assert sizes == {
        "kBlock": str(segments.BLOCK),
        "kQuantBlock": str(segments.QUANT_BLOCK),
        "kAddressColumns": str(segments.ADDRESS_COLUMNS),
        "kHyperColumns": str(segments.HYPER_COLUMNS),
    }
    for kind in ("Address", "HyperColumn"):
        (names,) = re.findall(rf"enum {kind} {{ ([^}}]*) }};", text)
        assert [getattr(segments, name) for name in names.split(", ")] == list(range(len(names.split(", "))))
    (types,) = re.findall(r"enum Type(?: : int64_t)? { ([^}]*) };", text)
    assert types == "NONE = -1, FP32 = 0, BF16 = 1, FP16 = 2"
    assert list(segments.TYPE_CODES.values()) == [-1, 0, 1, 2]
    (moments,) = re.findall(r"enum Moments(?: : int64_t)? { ([^}]*) };", text)
    assert moments == ", ".join(f"MOMENTS_{name.upper()} = {code}" for name, code in segments.MOMENT_CODES.items())


def test_square_roots_are_packed() -> None:
    """A loop that the compiler did not vectorise has ``sqrtss`` in it, one number at a time."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(build.library("cpu"))], capture_output=True, text=True, check=True
    ).stdout
    if "x86-64" in listing.splitlines()[1]:
        for packed in (r"vsqrtps .*%zmm", r"vsqrtps .*%ymm", r"\ssqrtps .*%xmm"):
            assert re.search(packed, listing), packed
    assert not re.search(r"sqrtss", listing)


@needs_compiler
def test_nothing_is_tuned_to_the_machine_that_builds() -> None:
    rules = build._cpu_rules() + build._cuda_rules() if build.compiler("cuda") else build._cpu_rules()
    assert "native" not in rules
    assert "-DLEVEL=base" in rules


@needs_compiler
@pytest.mark.parametrize("level", ["avx2", "base"])
def test_a_narrower_instruction_set_can_be_asked_for(level: str) -> None:
    code = "from lisa_ds.ops import cpu; print(cpu.level())"
    environment = os.environ | {"LISA_DS_CPU_LEVEL": level}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    if level == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    assert run.stdout.strip() == level


def test_without_a_compiler_the_reference_runs_with_one_warning(
    afresh: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path))
    segment = make_segment(MODES[0], 10)
    table = SegmentTable([segment], [Hyper()])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            masked_adamw_(table)
    assert float(segment.step) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "masked AdamW runs as plain torch, several times slower, because no kernel can be used: cpu: no C++ compiler was "
        "found; install g++ or set CXX"
    ]


@needs_compiler
def test_a_process_loads_one_library_whatever_becomes_of_the_cache(
    afresh: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The operators can be registered once; another copy of the library would end the process."""
    from lisa_ds.ops import cpu

    assert cpu.available() is None
    copied = shutil.copy(build.library("cpu"), tmp_path)
    monkeypatch.setattr(build, "library", lambda kind: Path(copied))
    cpu._load.cache_clear()
    assert cpu.available() is None


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason_and_no_error(
    afresh: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path / "file" / "cache"))
    reason = dispatch.unavailable("cpu")
    assert reason is not None
    assert "LISA_DS_CACHE: cannot write to" in reason


def test_what_was_built_ahead_of_time_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "prebuilt", lambda kind: tmp_path / "built.so" if kind == "cpu" else None)
    assert build.library("cpu") == build.compiled("cpu") == tmp_path / "built.so"


@needs_compiler
def test_a_source_that_does_not_compile_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(build.sources(), tmp_path / "csrc")
    with (tmp_path / "csrc" / "cpu" / "table.h").open("a") as file:
        file.write("this is no C++\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    (tmp_path / "out").mkdir()
    with pytest.raises(build.BuildError, match=r"^the cpu kernels do not compile: .*error.*$"):
        build.compile_into(tmp_path / "out", "cpu")


def test_ops_tells_what_is_there_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ops"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^reference +available ", told, re.M)
    assert re.search(r"^cpu +(available|not compiled|not available) ", told, re.M)
    if not torch.cuda.is_available():
        assert "triton     not available  Triton, NVIDIA and AMD GPUs: there is no GPU" in told
        assert "cuda       not available" in told
        assert "tensors on a GPU: there is none here" in told


@pytest.mark.nightly
@needs_compiler
def test_a_wheel_carries_what_was_built_ahead_of_time(tmp_path: Path) -> None:
    """Built without isolation, since the tools are here; then it is used from where it was unpacked, without a compiler."""
    environment = os.environ | {"LISA_DS_BUILD_OPS": "cpu"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    command[-1] = str(source)
    subprocess.run(command, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    place = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(place)
    assert (place / "lisa_ds" / "csrc" / "cuda").is_dir()
    code = "from lisa_ds.ops import build, cpu; print(cpu.available(), build.library('cpu'))"
    environment = os.environ | {"PYTHONPATH": str(place), "CXX": "none", "LISA_DS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=place, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"None {place}/lisa_ds/ops/masked_adamw_cpu.so"
    assert run.stderr == ""


@pytest.mark.nightly
def test_an_unknown_choice_of_kernels_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "runs"))
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(source)],
        env=os.environ | {"LISA_DS_BUILD_OPS": "gpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode
    assert "LISA_DS_BUILD_OPS: should be one of 0, all, cpu, cuda, got 'gpu'" in run.stdout + run.stderr
