"""What the ranks of tests/zero3/test_probe.py do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.live_bytes import LiveBytes
from lisa_ds.config.sampler_kinds import PROBES
from lisa_ds.engines.zero3.scoring import probe, side_backward
from lisa_ds.engines.zero3.scoring.probe import Probe
from lisa_ds.errors import EngineError
from lisa_ds.memory import probe_bytes
from tests.zero3 import engine_runs
from tests.zero3.engine_runs import build_engine, full_parameters
from tests.zero3.trajectory import LAYERS, Case

BATCHES, ROWS, LENGTH = 2, 2, 12
WINDOWED = ["accumulated", "hutchinson"]  # kinds that score a few blocks at a time
SEED = 5


def batches(rank: int) -> list[Tensor]:
    """The calibration data of one rank."""
    draw = torch.Generator().manual_seed(1000 + rank)
    return [torch.randint(0, 101, (ROWS, LENGTH), generator=draw) for _ in range(BATCHES)]


def calibration(module: nn.Module) -> Iterator[Tensor]:
    for rows in batches(dist.get_rank()):
        yield module(input_ids=rows, labels=rows).loss


def make_probe(engine: Any, **kwargs: Any) -> Probe:
    data = kwargs.pop("calibration", calibration)
    return Probe(engine.optimizer, engine.module, engine._stack, engine._backward_start, data, seed=SEED, **kwargs)


def with_dropout(engine: Any) -> Any:
    for layer in engine.module.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return engine


def snapshot(engine: Any) -> dict[str, Any]:
    """Everything that scoring must leave alone, copied."""
    optimizer = engine.optimizer
    states = [optimizer.optimizer.state[master] for master in optimizer.fp32_partitioned_groups_flat]
    return {
        "weights": [p.ds_tensor.clone() for p in engine.module.parameters()],
        "master": [master.detach().clone() for master in optimizer.fp32_partitioned_groups_flat],
        "moments": [value.clone() for state in states for value in state.values() if torch.is_tensor(value)],
        "gradients": [optimizer.grad_partitions_flat_buffer.clone()],
        "random": [torch.get_rng_state()],
        "requires_grad": [p.requires_grad for p in engine.module.parameters()],
        "training": [m.training for m in engine.module.modules()],
        "whole": [p.ds_status.name for p in engine.module.parameters()],
        "no_gradient": [p.grad is None for p in engine.module.parameters()],
        "counters": [
            optimizer.micro_step_id,
            optimizer._epilogue_ran_this_backward,
            optimizer._backward_active_depth,
            optimizer._backward_seen_this_step,
            optimizer._hooks_fired_this_backward,
            optimizer._max_expected_hooks_seen,
            optimizer._remaining_grad_acc_hooks,
            [(b.elements, len(b.params)) for b in optimizer.ipg_buckets.values()],
            engine.micro_steps,
            engine.global_steps,
        ],
        "methods": sorted(k for k, v in vars(optimizer).items() if callable(v)),
        "checkpoint_functions": [getattr(m, "_gradient_checkpointing_func", None) for m in engine.module.modules()],
        "input_hooks": [len(getattr(m, "_require_grads_hooks", ())) for m in engine.module.modules()],
        "module_hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.module.modules()],
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        # By their bits: zero.Init leaves what pads a partition as it finds the memory, which may be no number.
        return torch.equal(bits(a), bits(b)) if torch.is_tensor(a) else a == b

    def bits(value: torch.Tensor) -> torch.Tensor:
        return value.reshape(-1).view(torch.uint8)

    return [
        kind
        for kind in before
        if len(before[kind]) != len(after[kind])
        or not all(same(a, b) for a, b in zip(before[kind], after[kind], strict=True))
    ]


def run_scores(case: Case, sizes: list[int]) -> dict[str, Any]:
    """The scores after two steps of training, with the weights they belong to and what they disturbed."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine_runs.seed_weights()
    engine = with_dropout(build_engine(case))
    engine_runs.train(engine, case)
    with side_backward.partitioned(
        engine.optimizer
    ):  # train() has looked at every weight: what a step leaves whole is not now
        pass
    before = snapshot(engine)
    wanted = [(kind, size) for kind in PROBES for size in sizes if size == 3 or kind in WINDOWED]
    result: dict[str, Any] = {
        "scores": {(kind, size): make_probe(engine, probe_blocks=size).scores(kind) for kind, size in wanted},
        "changed": changed(before, snapshot(engine)),
        "parameters": full_parameters(engine),
    }
    if case.name == "plain":
        with patched(side_backward, "_evaluating", lambda module, stack: contextlib.nullcontext()):
            result["with dropout"] = make_probe(engine).scores("mean")
    engine.destroy()
    return result


def run_beside_training(cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Each case with and without scores after some of its steps: how far apart the two runs are."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine_runs.seed_weights()
    result: dict[str, dict[str, Any]] = {}

    def run(case: Case, score: Callable[[Any, int], None]) -> Any:
        engine = with_dropout(build_engine(case))
        torch.manual_seed(31 + dist.get_rank())
        outcome = engine_runs.train(engine, case, after_step=lambda step: score(engine, step))
        engine.destroy()
        return outcome

    def score(engine: Any, step: int) -> None:
        for kind in {0: WINDOWED, 2: ["mean", "empirical"]}.get(step, []):  # in mid interval, and right after a switch
            make_probe(engine, probe_blocks=3).scores(kind)

    def interrupted(engine: Any, step: int) -> None:
        if step == 0:
            with contextlib.suppress(KeyError):
                make_probe(engine, calibration=calls_that_fail(3)).scores("hutchinson")

    def unrestored(engine: Any, step: int) -> None:
        with patched(Probe, "_saved", saved_in_vain):
            score(engine, step)

    for case in cases:
        plain = run(case, lambda engine, step: None)
        result[case.name] = difference(plain, run(case, score))
        if case.name == "plain":
            result["interrupted"] = difference(plain, run(case, interrupted))
            result["unrestored"] = difference(plain, run(case, unrestored))
    return result


def calls_that_fail(number: int) -> Callable[[nn.Module], Iterator[Tensor]]:
    """Calibration whose call of that number fails after its first batch, on every rank."""
    calls = [0]

    def data(module: nn.Module) -> Iterator[Tensor]:
        calls[0] += 1
        for loss in calibration(module):
            yield loss
            if calls[0] == number:
                raise KeyError("anything")

    return data


@contextlib.contextmanager
def saved_in_vain(self: Probe, parameters: list[Any]) -> Iterator[list[Tensor]]:
    yield [parameter.ds_tensor.detach().clone() for parameter in parameters]


def difference(plain: Any, probed: Any) -> dict[str, Any]:
    return {
        "losses": plain.losses == probed.losses,
        "grad_norms": plain.grad_norms == probed.grad_norms,
        "layers": plain.layers == probed.layers,
        "moved": [n for n, p in plain.parameters.items() if not torch.equal(p, probed.parameters[n])],
    }


def run_bytes() -> dict[str, Any]:
    """The peak of what scoring keeps alive, by kind and window, beside what the planner says."""
    deepspeed.init_distributed(dist_backend="gloo")
    result: dict[str, Any] = {}
    for case, width, sizes in ((Case("fp32"), 4, (1, 2, LAYERS)), (Case("bf16", dtype="bf16"), 2, (2,))):
        engine = build_engine(case)
        for kind, size in [(k, size) for k in PROBES for size in (sizes if k == "accumulated" else [2])]:
            meter = LiveBytes()
            with contextlib.ExitStack() as undo:
                for name in ("Sums", "Norms", "Squares", "Slopes"):
                    undo.enter_context(patched(probe, name, metered(getattr(probe, name), meter)))
                undo.enter_context(patched(Probe, "_saved", metered_copy(Probe._saved, meter)))
                undo.enter_context(patched(probe, "fill", metered_fill(probe.fill, meter)))
                undo.enter_context(patched(probe.dist, "reduce_scatter_fn", unseen(probe.dist.reduce_scatter_fn)))
                make_probe(engine, calibration=first_batch, probe_blocks=size).scores(kind)
            ranks, shape = dist.get_world_size(), engine.model_shape
            planned = probe_bytes(shape, kind=kind, probe_blocks=size, world_size=ranks, weight_bytes=width)
            result[case.name, kind, size] = (meter.peaks["probe"], planned)
        engine.destroy()
    result["blocks"] = [sum(layer) for layer in shape.layers]
    return result


def first_batch(module: nn.Module) -> Iterator[Tensor]:
    yield next(calibration(module))


def unseen(collective: Any) -> Any:
    """``collective`` without the copy that gloo makes for itself, which is no tensor of ours."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return collective(*args, **kwargs)

    return run


def metered(collector: Any, meter: LiveBytes) -> Any:
    """``collector`` with every tensor counted that it allocates, and every gradient that is given to it."""

    class Metered(collector):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            with meter, meter.phase("probe"):
                super().__init__(*args)
            self.kept = meter.now

        def take(self, parameter: Any) -> None:
            late = time.monotonic() + 10
            while meter.now > self.kept and time.monotonic() < late:
                time.sleep(0.001)  # gloo's thread may not have let go of the last tensor yet
            with meter, meter.phase("probe"):
                meter._see(parameter.grad)
                super().take(parameter)

    return Metered


def metered_copy(saved: Any, meter: LiveBytes) -> Any:
    @contextlib.contextmanager
    def metered_saved(self: Probe, parameters: list[Any]) -> Iterator[list[Tensor]]:
        with contextlib.ExitStack() as stack:
            with meter, meter.phase("probe"):
                copies = stack.enter_context(saved(self, parameters))
            yield copies

    return metered_saved


def metered_fill(fill: Any, meter: LiveBytes) -> Any:
    def metered_write(parameter: Any, read_into: Any) -> None:
        meter._known.setdefault(id(parameter.ds_tensor.untyped_storage()), None)  # type: ignore[arg-type]
        with meter, meter.phase("probe"):
            fill(parameter, read_into)

    return metered_write


def run_mistakes() -> dict[str, Any]:
    """What is said of each mistake, and what a loss that does not reach every block counts for."""
    deepspeed.init_distributed(dist_backend="gloo")
    case = Case("mistakes", steps=1)
    engine = build_engine(case)
    engine_runs.train(engine, case)
    rank = dist.get_rank()
    said: dict[str, Any] = {}

    def attempt(name: str, data: Any, kind: str = "mean") -> None:
        before = snapshot(engine)
        try:
            make_probe(engine, calibration=data, probe_blocks=LAYERS - 1).scores(kind)
            said[name] = None
        except EngineError as error:
            said[name] = str(error)
        said[f"{name}, changed"] = changed(before, snapshot(engine))

    rows = batches(rank)

    def losses(count: int) -> Any:
        return lambda module: (module(input_ids=rows[0], labels=rows[0]).loss for _ in range(count))

    attempt("counts", losses(2 + rank))
    attempt("nothing", losses(0))
    attempt("detached", lambda module: (loss.detach() for loss in losses(2)(module)))
    once = iter(rows)
    attempt("used_up", lambda module: (module(input_ids=r, labels=r).loss for r in once), "accumulated")
    attempt("not_finite", lambda module: (loss * float("inf") for loss in losses(1)(module)))
    attempt("kind", losses(1), "gradient")
    engine.backward(engine(input_ids=rows[0], labels=rows[0]).loss)
    leaf = next(engine.module.parameters())
    leaf.grad = torch.zeros_like(leaf)
    attempt("gradients_left", losses(1))
    leaf.grad = None
    engine.step()

    def first_three_only(module: Any) -> Iterator[Tensor]:
        yield module(input_ids=rows[0], labels=rows[0]).loss
        yield module(input_ids=rows[1], output_hidden_states=True).hidden_states[3].square().mean()

    for kind in ("accumulated", "mean", "empirical"):
        said[kind] = make_probe(engine, calibration=first_three_only).scores(kind)
        said[f"{kind}, one batch"] = make_probe(engine, calibration=losses(1)).scores(kind)
    return said


def run_shared_layers() -> str:
    """What is said where two ranks share each layer."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine = build_engine(Case("autotp", heads=2, autotp=2))
    try:
        make_probe(engine)
    except EngineError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
