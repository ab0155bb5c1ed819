"""A login node has no torch to spare: what plans a run must not load it."""

from __future__ import annotations

import subprocess
import sys
import typing

import pytest

import lisa_ds


def test_planning_a_run_loads_no_torch() -> None:
    code = (
        "import sys, lisa_ds, lisa_ds.memory, lisa_ds.records, lisa_ds.sampling.schedule\n"
        "lisa_ds.load_config, lisa_ds.LisaError, lisa_ds.RunConfig, dir(lisa_ds)\n"
        "shape = lisa_ds.memory.ModelShape(layers=((8,),) * 4)\n"
        "lisa_ds.plan(shape, world_size=2), lisa_ds.LayerSampler(4, lisa_ds.LisaConfig()).layers_at(0)\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


@pytest.mark.parametrize("name", lisa_ds.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(lisa_ds)
    assert getattr(lisa_ds, name).__name__ == name


def test_what_plan_takes_and_returns_can_be_imported_beside_it() -> None:
    types = typing.get_type_hints(lisa_ds.plan).values()
    ours = {
        part
        for hint in types
        for part in (hint, *typing.get_args(hint))
        if "lisa_ds" in getattr(part, "__module__", "")
    }
    assert {kind.__name__ for kind in ours} == {"ModelShape", "LisaConfig", "Precision", "Plan"} <= set(lisa_ds.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        lisa_ds.initialise  # noqa: B018
