"""Every backend against the specification, the specification against torch, and mistakes that the same checks must see."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_ds.ops import Hyper, SegmentTable, build, masked_adamw_
from lisa_ds.ops import reference as specification
from lisa_ds.ops.segments import seed_word
from tests.isolated import exit_code, run_isolated
from tests.ops import address_runs, ops_runs, triton_mutants
from tests.ops.adamw_cases import FP32, MODES, Mode, make_segment

INTERPRETED = {"TRITON_INTERPRET": "1"}
BACKENDS: dict[str, tuple[str, dict[str, str]]] = {
    "reference": ("reference", {}),
    "cpu-avx512": ("cpu", {"LISA_DS_CPU_LEVEL": "avx512"}),
    "cpu-avx2": ("cpu", {"LISA_DS_CPU_LEVEL": "avx2"}),
    "cpu-base": ("cpu", {"LISA_DS_CPU_LEVEL": "base"}),
    "triton": ("triton", INTERPRETED),
}
BY_NAME = {mode.name: mode for mode in MODES}


def needs_compiler() -> None:
    if (reason := build.unbuildable("cpu")) is not None:
        pytest.skip(f"the CPU kernels cannot be built here: {reason}")


class Measured:
    """What a backend did, by mode: measured once, in a process with its environment, the modes of the short run apart."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._known: dict[str, Any] = {}

    def __getitem__(self, mode: str) -> Any:
        if mode not in self._known:
            backend, env = BACKENDS[self._name]
            if backend == "cpu":
                needs_compiler()
            names = [name for name in BY_NAME if (name in SHORT) == (mode in SHORT)]
            self._known |= run_isolated(ops_runs.run, self._folder, backend, names, env=env)
        return self._known[mode]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.cache(lambda name: Measured(name, tmp_path_factory.mktemp("ops")))


pytestmark = pytest.mark.by_case("backend")

# All modes take Triton's interpreter and the reference half a minute each, and the levels of the CPU kernels are one source.
SHORT = ("fp32", "mixed", "sr_16bit", "int8_sr", "none_master", "none_sr")
ALL = [
    pytest.param(
        *(backend, mode),
        id=f"{backend}-{mode}",
        marks=[pytest.mark.more] if backend in ("cpu-avx2", "cpu-base") or mode not in SHORT else [],
    )
    for backend in BACKENDS
    for mode in BY_NAME
]


def stochastic(mode: str) -> bool:
    return not BY_NAME[mode].master and BY_NAME[mode].weight == torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "mode"), [p for p in ALL if not stochastic(p.values[1]) and "int8" not in p.values[1]]
)
def test_twenty_steps_are_as_close_to_fp64_as_torch(measured: Any, backend: str, mode: str) -> None:
    found = measured(backend)[mode]["accuracy"]
    assert found["steps"] == 20
    for part in ("", " exp_avg", " exp_avg_sq") if BY_NAME[mode].moments is not None else ("",):
        assert found[f"ours{part}"] <= 2 * found[f"torch{part}"], found
    assert found["written_back"] == 0


@pytest.mark.parametrize(("backend", "mode"), ALL)
def test_one_step_from_the_same_state_is_as_close_to_fp64_as_torch(measured: Any, backend: str, mode: str) -> None:
    found = measured(backend)[mode]["one_step"]
    if stochastic(mode):
        assert found["last_places"] < 1.001  # one of the two neighbours
    else:
        assert found["ours"] <= 2 * found["torch"], found
    if BY_NAME[mode].moments is None:
        return
    # In shares of the largest: fp32; half a last place of bf16, or a whole one where it is random; half a code.
    bounds = {torch.float32: (2e-7, 2e-7), torch.bfloat16: (2**-8, 2**-7), torch.int8: (0.01, 0.01)}
    first, second = bounds[BY_NAME[mode].moments]
    assert found["exp_avg"] <= first
    assert found["exp_avg_sq"] <= second


@pytest.mark.parametrize(("backend", "mode"), ALL)
def test_backends_agree_with_the_specification(measured: Any, backend: str, mode: str) -> None:
    found = measured(backend)[mode]["reference"]
    assert found["step"] == (0, 0.0, 0.0)  # an overflow does not count
    quantised = BY_NAME[mode].moments == torch.int8
    if BY_NAME[mode].weight != torch.float32:
        most, share, _ = found["weight"]
        assert most <= 1  # last place, where fp32 results a rounding apart fall on two sides
        assert share == 0
    else:
        assert found["weight"][2] <= (5e-4 if quantised else 2e-6)
    if "master" in found:
        # A code that rounds the other way is 1 % of a moment, and so of an update of at most 3e-3.
        assert found["master"][2] <= (5e-4 if quantised else 2e-6)
    for moment in ("exp_avg", "exp_avg_sq"):
        if BY_NAME[mode].moments is None:
            assert moment not in found
        elif quantised:
            assert found[moment][1] <= 2e-3  # share of codes that are more than one apart after three steps
        elif BY_NAME[mode].moments == torch.bfloat16:
            assert found[moment][1] <= 1e-3
        else:
            assert found[moment][2] <= 1e-8


@pytest.mark.parametrize(("backend", "mode"), ALL)
def test_frozen_segments_keep_every_byte_even_with_nan_gradients(measured: Any, backend: str, mode: str) -> None:
    assert measured(backend)[mode]["frozen"]


@pytest.mark.parametrize(("backend", "mode"), ALL)
def test_an_overflow_changes_nothing(measured: Any, backend: str, mode: str) -> None:
    assert measured(backend)[mode]["overflow"]


@pytest.mark.parametrize(("backend", "mode"), ALL)
def test_gradients_that_are_not_finite_are_told_and_spoil_themselves_alone(
    measured: Any, backend: str, mode: str
) -> None:
    found = measured(backend)[mode]["not_finite"]
    assert not found["nan"]
    assert not found["inf"]
    if BY_NAME[mode].moments != torch.int8:  # a block of those shares a scale
        assert found["nan spoilt"] == [5, 2999]


@pytest.mark.parametrize(("backend", "mode"), [p for p in ALL if BY_NAME[p.values[1]].moments in (None, FP32)])
def test_zero_over_zero_is_nan_with_moments_and_without(measured: Any, backend: str, mode: str) -> None:
    """As in torch, and with eps 0 alone: tests with the usual one have zeros, too."""
    assert measured(backend)[mode]["zero_over_zero"] == [5, 2999]


@pytest.mark.parametrize(("backend", "mode"), ALL)
def test_the_norm_is_exact_and_repeatable(measured: Any, backend: str, mode: str) -> None:
    found = measured(backend)[mode]["sum_of_squares"]
    assert found["ours"] == found["again"]
    assert found["ours"] == pytest.approx(found["exact"], rel=1e-6)


# ---- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_nothing_is_touched_behind_the_end_of_a_tensor(tmp_path: Path, backend: str) -> None:
    name, env = BACKENDS[backend]
    if name == "cpu":
        needs_compiler()
    assert run_isolated(address_runs.run_at_the_edge, tmp_path, name, env=env)


def test_a_kernel_without_its_load_mask_is_seen(tmp_path: Path) -> None:
    """Control: results do not change, but it reads what it must not."""
    code = exit_code(address_runs.run_at_the_edge, tmp_path, "triton", "load mask dropped", env=INTERPRETED)
    assert code in (-signal.SIGSEGV, -signal.SIGBUS)


def test_offsets_beyond_two_billion_in_triton(tmp_path: Path) -> None:
    for mode, (same, moved) in run_isolated(address_runs.run_far_away, tmp_path, env=INTERPRETED).items():
        assert same, mode
        assert moved > 290, mode


def test_offsets_beyond_two_billion_in_cpp(tmp_path: Path) -> None:
    needs_compiler()
    found = run_isolated(address_runs.run_across_two_billion, tmp_path)
    assert found["last"] == found["last_most"] == pytest.approx(-0.5, rel=1e-4)  # the last 300 took one step each
    assert found["before"] == 0.0
    assert found["squares"] == 300.0


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mutant",
    [
        triton_mutants.ARITHMETIC[0],
        *(pytest.param(other, marks=pytest.mark.more) for other in triton_mutants.ARITHMETIC[1:]),
        *triton_mutants.WITHOUT_MOMENTS,
    ],
)
def test_a_wrong_kernel_is_seen(tmp_path: Path, mutant: str) -> None:
    """Control: each of these breaks a bound that kernels are held to, in every mode that has what it breaks."""
    passes = run_isolated(ops_runs.run_mutant, tmp_path, mutant, env=INTERPRETED)
    assert len(passes) == (3 if mutant in triton_mutants.WITHOUT_MOMENTS else 5)
    assert not any(passes.values()), passes


def test_the_interpreters_own_cast_would_be_seen(tmp_path: Path) -> None:
    """Control: it cuts bf16 off instead of rounding, for about half of all weights."""
    assert run_isolated(ops_runs.run_truncation, tmp_path, env=INTERPRETED) > 500


@pytest.mark.nightly
def test_deepspeeds_fused_adam_corrects_every_tensor_for_one_history() -> None:
    """Control: of two tensors of which one has taken three steps and the other one, it gets the first wrong; ours does not."""
    from deepspeed.ops.adam import FusedAdam

    from lisa_ds.optim import MaskedAdamW

    results = {}
    for name, kind in (("deepspeed", FusedAdam), ("ours", MaskedAdamW), ("torch", torch.optim.AdamW)):
        both = [torch.nn.Parameter(torch.ones(64)) for _ in range(2)]
        optimizer = kind(both, lr=1e-2, weight_decay=0.0)
        for step in range(3):
            both[0].grad = torch.full((64,), 1.0 + step)
            both[1].grad = torch.ones(64) if step == 2 else None
            optimizer.step()
        results[name] = [float(p.detach()[0]) for p in both]
    assert results["ours"] == pytest.approx(results["torch"], abs=1e-6)
    assert max(abs(a - b) for a, b in zip(results["deepspeed"], results["torch"], strict=True)) > 1e-3


# ---- precision ---------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased_and_a_function_of_seed_and_step() -> None:
    index = torch.arange(2**18)
    bits = specification.random_bits(seed_word(1, 2), 3, index)
    assert torch.equal(bits, specification.random_bits(seed_word(1, 2), 3, index))
    for other in (
        specification.random_bits(seed_word(1, 2), 4, index),
        specification.random_bits(seed_word(1, 3), 3, index),
        specification.random_bits(seed_word(2, 2), 3, index),
        specification.random_bits(seed_word(1, 2), 3, index, specification.FOR_SECOND_MOMENT),
        specification.random_bits(seed_word(1, 2), 3, index + 2**33),
        bits.roll(1),
    ):
        agreement = float((other == bits).double().mean())
        assert agreement < 1e-4  # 2**-16 by chance
        x, y = other.double() - 2**15, bits.double() - 2**15
        assert abs(float((x * y).mean() / (x.std() * y.std()))) < 0.01
    counts = torch.bincount(bits >> 8, minlength=256).double()
    assert float(((counts - 1024) ** 2 / 1024).sum()) < 370  # chi-square, 255 degrees of freedom: 5 sigma
    for share in (0.1, 0.5, 0.97):
        low, place = 1.0, 2.0**-7
        rounded = specification.round_stochastically(torch.full((2**18,), low + share * place), bits).double()
        assert set(rounded.unique().tolist()) == {low, low + place}
        error = float((rounded.mean() - (low + share * place)).abs()) / place
        assert error < 5 * (share * (1 - share) / 2**18) ** 0.5


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), -float("inf"), 3.0, -1.5])
def test_what_bf16_holds_is_not_rounded(value: float) -> None:
    bits = torch.arange(2**16)
    rounded = specification.round_stochastically(torch.full((2**16,), value), bits)
    assert torch.equal(rounded, torch.full((2**16,), value, dtype=torch.bfloat16))


def test_nan_stays_nan_whatever_the_bits() -> None:
    odd = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).expand(2**16)
    assert specification.round_stochastically(odd, torch.arange(2**16)).isnan().all()


def test_small_updates_count_without_a_master_copy_and_would_not_to_nearest() -> None:
    """1000 steps of a hundredth of a last place each: rounded to nearest, the weight would stand still."""
    mode = next(mode for mode in MODES if mode.name == "sr_fp32_moments")
    segment = make_segment(mode, 4096)
    assert segment.weight is not None
    segment.weight.fill_(1.0)
    segment.grad.fill_(-1.0)
    lr = 2**-7 / 100
    table = SegmentTable([segment], [Hyper(lr=lr, eps=0.0)])
    for _ in range(1000):
        masked_adamw_(table)
    assert float(segment.weight.double().mean()) == pytest.approx(1 + 1000 * lr, rel=2e-3)
    assert torch.tensor(1.0 + lr).bfloat16() == 1.0


def test_8_bit_codes_keep_small_values_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(1000, generator=draw) * torch.logspace(-3, 0, 1000)
    codes, scales = specification.quantise_signed(value)
    assert codes.dtype == torch.int8
    assert scales.shape == (4,)
    error = (specification.dequantise_signed(codes, scales) - value).abs()
    assert float((error / value.abs().clamp(min=0.05 * float(value.abs().max()))).max()) < 0.05
    square = value.square()
    codes, scales = specification.quantise_unsigned(square)
    assert int(codes.min()) >= 1  # none stands for zero
    relative = (specification.dequantise_unsigned(codes, scales) / square.clamp(min=1e-6 * float(square.max()))).log()
    assert float(relative[square > 1e-6 * float(square.max())].abs().median()) < 0.05


def test_fp32_gradients_keep_what_64_micro_batches_add_up_to() -> None:
    """Added up in bf16, most of them are lost; the kernel takes the fp32 sum beside a bf16 weight."""
    draw = torch.Generator().manual_seed(1)
    parts = [(0.01 + 0.001 * torch.randn(4096, generator=draw)).bfloat16() for _ in range(64)]
    exact = torch.stack(parts).double().sum(0)
    single, half = torch.zeros(4096), torch.zeros(4096, dtype=torch.bfloat16)
    for part in parts:
        single += part
        half += part
    errors = {}
    for name, gradient in (("fp32", single), ("bf16", half)):
        mode = Mode(name, grad=gradient.dtype)
        segment = make_segment(mode, 4096)
        segment.grad.copy_(gradient)
        masked_adamw_(SegmentTable([segment], [Hyper()]))
        errors[name] = float((segment.exp_avg.double() - 0.1 * exact).abs().max())
    assert errors["fp32"] < 1e-7
    assert errors["bf16"] > 1000 * errors["fp32"]
