"""What the CUDA kernels compute when the CPU plays the GPU, and mistakes that the same checks must see."""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lisa_ds.ops import build
from tests.isolated import exit_code, run_isolated
from tests.ops import address_runs, ops_runs, test_ops
from tests.ops.adamw_cases import FP32, MODES
from tests.ops.cuda_emulator import (
    DROPPED_MASK,
    EMULATOR,
    MISTAKES,
    SPARED,
    WITH_MOMENTS,
    WITHOUT_MOMENTS,
    emulated,
    source,
)

pytestmark = pytest.mark.skipif(
    build.unbuildable("cuda") is not None, reason=f"the CUDA kernels cannot be built here: {build.unbuildable('cuda')}"
)

BY_NAME = {mode.name: mode for mode in MODES}

# ---- what they compute -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Compiles the kernels, with a part of their source replaced, into a library that runs them on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")

    @functools.cache
    def library(old: str = "", new: str = "") -> str:
        folder = tmp_path_factory.mktemp("emulator")
        assert not old or source().count(old) == 1, f"{old!r} is not in the source, or not once"
        (folder / "kernels.cu").write_text(source().replace(old, new) if old else source())
        (folder / "emulator.cpp").write_text(EMULATOR)
        # nvcc for its headers' sake: it hands C++ to g++.
        command = [str(build.compiler("cuda")), "-x", "c++", "-std=c++17", "-O1", "-cudart", "none", "-shared"]
        command += ["-Xcompiler", "-fPIC,-fno-strict-aliasing", "-o", "emulator.so", "emulator.cpp"]
        subprocess.run(command, cwd=folder, check=True)
        return str(folder / "emulator.so")

    return library


@pytest.fixture(scope="module")
def measured(emulator: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What tests/ops/test_ops.py asks of every backend."""
    found = run_isolated(emulated, tmp_path_factory.mktemp("measured"), ops_runs.run, emulator(), "cuda")
    return lambda backend: found


@pytest.mark.parametrize("mode", BY_NAME)
def test_they_compute_what_is_specified(measured: Callable[[str], Any], mode: str) -> None:
    if not test_ops.stochastic(mode) and "int8" not in mode:
        test_ops.test_twenty_steps_are_as_close_to_fp64_as_torch(measured, "cuda", mode)
    for check in (
        test_ops.test_one_step_from_the_same_state_is_as_close_to_fp64_as_torch,
        test_ops.test_backends_agree_with_the_specification,
        test_ops.test_frozen_segments_keep_every_byte_even_with_nan_gradients,
        test_ops.test_an_overflow_changes_nothing,
        test_ops.test_gradients_that_are_not_finite_are_told_and_spoil_themselves_alone,
        test_ops.test_the_norm_is_exact_and_repeatable,
    ):
        check(measured, "cuda", mode)
    if BY_NAME[mode].moments in (None, FP32):
        test_ops.test_zero_over_zero_is_nan_with_moments_and_without(measured, "cuda", mode)


def test_nothing_is_touched_behind_the_end_of_a_tensor(emulator: Callable[..., str], tmp_path: Path) -> None:
    assert run_isolated(emulated, tmp_path, address_runs.run_at_the_edge, emulator(), "cuda")


def test_offsets_beyond_two_billion(emulator: Callable[..., str], tmp_path: Path) -> None:
    for mode, (same, moved) in run_isolated(emulated, tmp_path, address_runs.run_far_away, emulator()).items():
        assert same, mode
        assert moved > 290, mode


# ---- mistakes ----------------------------------------------------------------------------------------------------


def one_of(mistakes: dict[str, tuple[str, str]]) -> list[Any]:
    """The names, all but one of them for the longer run: a kernel is compiled for each."""
    first, *others = mistakes
    return [first, *(pytest.param(other, marks=pytest.mark.more) for other in others)]


@pytest.mark.parametrize("where", one_of(DROPPED_MASK))
def test_a_dropped_load_mask_is_seen(emulator: Callable[..., str], tmp_path: Path, where: str) -> None:
    """Control: results do not change, but the process dies of it."""
    library = emulator(*DROPPED_MASK[where])
    code = exit_code(emulated, tmp_path, address_runs.run_at_the_edge, library, "cuda")
    assert code in (-signal.SIGSEGV, -signal.SIGBUS)


def distances(names: list[str]) -> dict[str, float]:
    """Of weights from the specification's, by mode."""
    found = {name: ops_runs.against_reference("cuda", BY_NAME[name]) for name in names}
    return {name: fields["master" if "master" in fields else "weight"][2] for name, fields in found.items()}


BOUNDS = dict.fromkeys((*WITH_MOMENTS, *WITHOUT_MOMENTS), 2e-6) | {"int8_master": 1.5e-4}


def test_the_right_kernel_keeps_the_bounds_below(emulator: Callable[..., str], tmp_path: Path) -> None:
    found = run_isolated(emulated, tmp_path, distances, emulator(), list(BOUNDS))
    assert all(found[mode] <= bound for mode, bound in BOUNDS.items()), found


@pytest.mark.parametrize("mistake", one_of(MISTAKES))
def test_a_wrong_kernel_is_seen(emulator: Callable[..., str], tmp_path: Path, mistake: str) -> None:
    """Control: each of these breaks the bounds in every mode, but where there is nothing that it could break."""
    found = run_isolated(emulated, tmp_path, distances, emulator(*MISTAKES[mistake]), list(BOUNDS))
    kept = {mode for mode, bound in BOUNDS.items() if found[mode] <= bound}
    assert kept == set(SPARED.get(mistake, ())), found
