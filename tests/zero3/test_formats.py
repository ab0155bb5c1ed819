"""The engine's state in every format: against the specification step by step, to the byte, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Runs, run_ranks
from tests.shortened import shortened
from tests.zero3.format_runs import run_format, run_refusals, run_rounding
from tests.zero3.trajectory import Case, build_model

pytestmark = [pytest.mark.multirank, pytest.mark.by_case("name")]

FORMATS = {
    "mixed": {"precision": "mixed"},
    "sr_fp32_moments": {"precision": "stochastic_rounding"},
    "sr_16bit": {"precision": "stochastic_rounding", "moments": "bf16"},
    "int8_master": {"moments": "int8"},
    "int8_sr": {"precision": "stochastic_rounding", "moments": "int8"},
    "none": {"moments": "none"},
    "none_sr": {"precision": "stochastic_rounding", "moments": "none"},
}
CASES = [Case(name, dtype="bf16", steps=8, width=2, lisa={"optimizer": fields}) for name, fields in FORMATS.items()]
CASES.append(
    Case("int8_offload", dtype="bf16", steps=8, width=2, offload=True, lisa={"optimizer": {"moments": "int8"}})
)
CASES.append(Case("int8_accumulation", dtype="bf16", steps=8, accumulation=2, lisa={"optimizer": {"moments": "int8"}}))


each = pytest.mark.parametrize("name", shortened([case.name for case in CASES], "mixed", "sr_16bit", "int8_sr"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs[str, list[dict[str, Any]]]:
    """By name of the case, what each rank saw."""
    folder, cases = tmp_path_factory.mktemp("formats"), {case.name: case for case in CASES}
    return Runs(lambda name: run_ranks(2, run_format, folder, cases[name], folder / name))


@each
def test_each_step_is_the_specifications(runs: Any, name: str) -> None:
    for rank in runs[name]:
        assert rank["wrong"] == []
        assert rank["frozen_moved"] == []


@each
def test_bytes_are_planned_to_the_byte(runs: Any, name: str) -> None:
    for rank in runs[name]:
        assert rank["bytes_checked"] >= 4
        assert rank["bytes_wrong"] == []


@each
def test_a_resumed_run_is_the_same_to_the_bit(runs: Any, name: str) -> None:
    for rank in runs[name]:
        assert rank["resumed_losses"] == rank["losses"][5:]
        assert rank["resumed_equal"]


@each
def test_it_learns_as_mixed_does(runs: Any, name: str) -> None:
    like = "none" if name.startswith("none") else "mixed"  # without moments it is another method
    losses, mixed = runs[name][0]["losses"], runs[like][0]["losses"]
    assert losses[-1] < losses[0]
    if name not in ("int8_accumulation", "int8_given"):  # another model or other data
        assert losses[-1] == pytest.approx(mixed[-1], abs=0.02)


@each
def test_deepspeeds_accessors_and_the_export_read_it(runs: Any, name: str) -> None:
    for rank in runs[name]:
        found = rank["accessors"]
        assert len(set(found["shapes"])) == 1
        assert found["distance"] < 0.01  # the fp32 weight is the bf16 one, or near it
        if name.startswith("none"):
            assert found["refused"] == "exp_avg_sq: is not kept with lisa.optimizer.moments 'none'"
        else:
            assert found["positive"]
            assert found["moments"] > 0
    width = next(case.width for case in CASES if case.name == name)
    expected = {n: tuple(p.shape) for n, p in build_model(width=width).named_parameters()}
    assert {n: tuple(shape) for n, shape in runs[name][0]["exported"].items()} == expected


@pytest.mark.parametrize(
    "name", shortened([case.name for case in CASES if case.name != "mixed"], "sr_16bit", "int8_sr")
)
def test_another_format_is_refused_by_name(runs: Any, name: str) -> None:
    message = runs[name][0]["refused"]
    assert "was saved with lisa.optimizer." in message
    assert "resume with the saved policies" in message


@pytest.mark.more
def test_files_are_no_larger_than_the_state(runs: Any) -> None:
    """Without a master copy the checkpoint holds the sampled weights, not the whole buffer that they are views of."""
    files = {name: runs[name][0]["file"] for name in FORMATS}
    assert files["none_sr"] < files["int8_sr"] < files["sr_16bit"] < files["sr_fp32_moments"] < files["mixed"]


@pytest.mark.more
def test_each_visit_rounds_by_other_numbers(tmp_path: Path) -> None:
    """A unit counts its steps anew at each visit: the first step of all of them would be rounded alike."""
    seen = run_ranks(1, run_rounding, tmp_path)[0]
    assert len({tuple(bits.tolist()) for bits in seen}) == len(seen) == 4


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(1, run_refusals, tmp_path_factory.mktemp("refusals"))[0]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sgd", ["EngineError: optimizer: SGD is not AdamW", "set lisa.optimizer to 'adamw' to keep the optimizer"]),
        ("sgd kept", ["nothing was refused"]),
        ("adam", ["optimizer: Adam adds its weight decay to the gradient"]),
        ("adam without decay", ["nothing was refused"]),
        ("amsgrad", ["optimizer: AdamW is set to amsgrad or maximize"]),
        (
            "rounded fp32",
            ["lisa.optimizer.precision", "this model's are torch.float32", "train in bf16, or use 'mixed'"],
        ),
        ("rounded offload", ["use 'mixed', or remove zero_optimization.offload_optimizer"]),
        ("rounded offload of weights", ["use 'mixed', or remove zero_optimization.offload_param"]),
        ("own step", ["optimizer: Own has a step of its own"]),
        ("ours", ["nothing was refused"]),
        (
            "ours, clipping",
            ["optimizer: MaskedAdamW clips to max_grad_norm, which under the engine is gradient_clipping"],
        ),
        ("ours, otherwise", ["MaskedAdamW has StateFormat(precision='mixed', moments='int8')", "set both alike"]),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(messages: dict[str, str], name: str, parts: list[str]) -> None:
    for part in parts:
        assert part in messages[name]
