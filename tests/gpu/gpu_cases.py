"""Segments on a GPU, and the backends that step them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_ds.ops import Backend, Segment, unavailable
from tests.gpu import gpu_runs
from tests.ops.adamw_cases import MODES, Mode, clone, make_segments

BACKENDS: tuple[Backend, ...] = ("triton", "cuda")


def on_gpu(mode: Mode, **options: Any) -> list[Segment]:
    return make_segments(mode, **options, device="cuda")


def copies(made: list[Segment]) -> list[Segment]:
    return [clone(segment) for segment in made]


def state_of(made: list[Segment]) -> list[Tensor]:
    """Every tensor of the state, as bytes, steps apart."""
    tensors = [getattr(segment, name) for segment in made for name in gpu_runs.STATE if name != "step"]
    return [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor is not None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    if (reason := unavailable(chosen)) is not None:
        pytest.skip(f"{chosen}: {reason}")
    return chosen


each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
