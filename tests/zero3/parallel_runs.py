"""Bodies that run on four ranks, of which some share layers, a sequence, or second copies of the weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import lisa_ds
from lisa_ds.engines.zero3 import parallel
from lisa_ds.engines.zero3.optimizer import fused, window
from lisa_ds.errors import LisaError
from tests import tiny
from tests.zero3 import engine_runs, parallel_model, trajectory
from tests.zero3.checkpoint_runs import moments
from tests.zero3.parallel_groups import finish, fresh_groups, sequence_loss, shared_sequences
from tests.zero3.parallel_model import Mpu
from tests.zero3.trajectory import MICRO_BATCH, SEQUENCE, Case, Outcome

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "partitioned": {"partition_activations": True},
    "partitioned_cpu": {"partition_activations": True, "cpu_checkpointing": True},
    "contiguous": {
        "partition_activations": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": parallel_model.LAYERS,
    },
}
"""What ``deepspeed.checkpointing`` is configured by."""


@dataclass(frozen=True)
class Shared:
    """A run of the model written by hand, whose layers are shared by two ranks each."""

    case: Case
    checkpoint: str = ""  # one of CHECKPOINTS, or "torch", which is not reentrant
    hook: bool = False  # let the embeddings' output require grad
    marked: bool = True  # parts of layers are marked as Megatron marks them


# ---- layers shared by groups of a script's own --------------------------------------------------------------------


def build_shared(run: Shared) -> tuple[Any, Mpu]:
    mpu = Mpu(2)
    model = parallel_model.share_(parallel_model.build(), mpu)
    model.train()
    for parameter in () if run.marked else model.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    config = trajectory.deepspeed_config(run.case, mpu.get_data_parallel_world_size())
    if run.checkpoint == "torch":
        model.body.checkpoint = functools.partial(checkpoint, use_reentrant=False)
    elif run.checkpoint:
        config["activation_checkpointing"] = CHECKPOINTS[run.checkpoint]
        deepspeed.checkpointing.configure(mpu, deepspeed_config=config)
        model.body.checkpoint = deepspeed.checkpointing.checkpoint
    if run.hook:
        model.body.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    optimizer = torch.optim.AdamW(trajectory.parameter_groups(model), lr=1e-3, eps=trajectory.EPS)
    engine, *_ = lisa_ds.initialize(
        model=model, optimizer=optimizer, config=config, mpu=mpu, lisa_config=run.case.lisa_config
    )
    return engine, mpu


def run_shared(run: Shared) -> Outcome:
    with fresh_groups():
        engine, mpu = build_shared(run)
        outcome = finish(engine, engine_runs.run_case(run.case, engine))
        outcome.parameters = parallel_model.whole(outcome.parameters, mpu)
        return outcome


def run_cut_off() -> str:
    """The refusal of a reentrant checkpoint that cuts sampled blocks off."""
    with fresh_groups():
        try:
            run_shared(Shared(Case("cut", steps=1, lisa={"embeddings": "never"}), checkpoint="plain"))
        except LisaError as error:
            return str(error)
        return "nothing was refused"


# ---- layers shared by AutoTP --------------------------------------------------------------------------------------


def run_autotp(case: Case) -> Outcome:
    with fresh_groups():
        engine = engine_runs.build_engine(case)
        return finish(engine, engine_runs.run_case(case, engine))


def run_resume(case: Case, folder: Path, saved: int) -> dict[str, Any]:
    """A run that saves after ``saved`` steps, and one resumed from there, bit for bit the same; and refusals."""
    with fresh_groups():
        engine = engine_runs.build_engine(case)
        tag = f"after{saved}"

        def save(step: int) -> None:
            if step + 1 == saved:
                engine.save_checkpoint(str(folder), tag=tag)

        whole = engine_runs.train(engine, case, after_step=save)
        state = moments(engine)
        engine.destroy()
        engine = engine_runs.build_engine(case, shift=0.5)
        rows = torch.zeros(MICRO_BATCH, SEQUENCE, dtype=torch.long)
        with torch.no_grad():
            engine(input_ids=rows)  # what hpZ keeps of the weights is that of others now
        engine.load_checkpoint(str(folder), tag=tag)
        part = engine_runs.train(engine, case, first=saved)
        result = {
            "losses": part.losses == whole.losses[saved:],
            "norms": part.grad_norms == whole.grad_norms[saved:],
            "layers": part.layers == whole.layers[saved:],
            "parameters": all(torch.equal(part.parameters[n], p) for n, p in whole.parameters.items()),
            "state": all(
                torch.equal(a.view(torch.int32), b.view(torch.int32))
                for a, b in zip(moments(engine), state, strict=True)
            ),
        }
        with contextlib.suppress(LisaError):
            result["warm start"] = ""
            try:
                engine.load_checkpoint(str(folder), tag=tag, load_module_only=True)
            except LisaError as error:
                result["warm start"] = str(error)
        engine.destroy()
        return result


def refused_resume(case: Case, folder: Path, saved: int) -> str:
    """The message for a checkpoint of shared layers in an engine that shares none."""
    with fresh_groups():
        engine = engine_runs.build_engine(case)
        try:
            engine.load_checkpoint(str(folder), tag=f"after{saved}")
        except LisaError as error:
            return str(error)
        finally:
            engine.destroy()
        return "nothing was refused"


# ---- shared sequences ---------------------------------------------------------------------------------------------


def run_sequence(case: Case) -> Outcome:
    model = trajectory.build_model(heads=case.heads)
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    with shared_sequences(model) as mpu:
        engine, *_ = lisa_ds.initialize(
            model=model,
            optimizer=torch.optim.AdamW(trajectory.parameter_groups(model), lr=1e-3, eps=trajectory.EPS),
            config=trajectory.deepspeed_config(case, 2),
            mpu=mpu,
            lisa_config=case.lisa_config,
        )
        return finish(engine, engine_runs.run_case(case, engine, sequence_loss))


# ---- second copies ------------------------------------------------------------------------------------------------


def run_second_copies(case: Case) -> Outcome:
    with fresh_groups():
        engine = engine_runs.build_engine(case)
        parameters = list(engine.module.parameters())
        outcome = engine_runs.run_case(case, engine)
        outcome.extra["copied"] = sum(p.ds_secondary_tensor is not None for p in parameters)
        return outcome


# ---- refusals -----------------------------------------------------------------------------------------------------


def refusal(change: Callable[[dict[str, Any]], Any], *, model: Any = None, **kwargs: Any) -> str:
    """The message with which a changed config is refused."""
    config = trajectory.deepspeed_config(Case("refused"), 4)
    change(config)
    model = model or trajectory.build_model(layers=2, heads=2)
    try:
        lisa_ds.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config, **kwargs)
        return "nothing was refused"
    except LisaError as error:
        return f"{type(error).__name__}: {error}"


def run_refusals() -> dict[str, str]:
    """What groups of ranks are refused for, once the engine knows them."""
    messages = {}

    def attempt(name: str, change: Callable[[dict[str, Any]], Any], **kwargs: Any) -> None:
        messages[name] = refusal(change, **kwargs)

    zero = "zero_optimization"
    mesh = {"sequence_parallel_size": 2, "data_parallel_size": 2}
    hpz = {"zero_hpz_partition_size": 2}
    attempt("experts", lambda c: c.update(expert_parallel={"enabled": True, "autoep_size": 2}))
    attempt("mesh", lambda c: c.update(mesh))
    attempt("weights", lambda c: c[zero].update(zero_quantized_weights=True))
    attempt("gradients", lambda c: c[zero].update(zero_quantized_gradients=True))
    attempt("autotp and hpz", lambda c: c.update(tensor_parallel={"autotp_size": 2}) or c[zero].update(hpz))
    with fresh_groups():
        attempt("mpu and hpz", lambda c: c[zero].update(hpz), mpu=Mpu(2))
    with fresh_groups():
        attempt("mesh_param", lambda c: None, mesh_param=(2, 2))
    groups.mesh_device = None
    model = trajectory.build_model(layers=2, heads=2)
    with shared_sequences(model) as mpu:
        attempt("all-reduce", lambda c: c[zero].update(reduce_scatter=False), model=model, mpu=mpu)
    stages = deepspeed.pipe.PipelineModule(layers=[torch.nn.Linear(4, 4)] * 2, num_stages=2)
    attempt("stages", lambda c: None, model=stages)
    return messages


# ---- trainers -----------------------------------------------------------------------------------------------------


def run_trainer(folder: Path, sharing: int, tied: bool) -> tuple[list[tuple[float, float]], float]:
    """Losses and gradient norms of an attached trainer, and its held-out loss over rows that do not divide evenly."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config(tie_word_embeddings=tied))  # before the arguments: not partitioned
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config: dict[str, Any] = {**dict.fromkeys(keys, "auto"), "zero_optimization": {"stage": 3}}
    if sharing > 1:
        config["tensor_parallel"] = {"autotp_size": sharing}
    arguments = TrainingArguments(
        str(folder),
        deepspeed=config,
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=trajectory.EPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 200, (16, 12), generator=draw)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:7])
    lisa_ds.attach(trainer, {"num_sampled_layers": 1, "interval_steps": 2})
    trainer.train()
    history = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return history, trainer.evaluate()["eval_loss"]


# ---- all of it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cases:
    """What is run on four ranks: layers shared by AutoTP and by an mpu, sequences shared, second copies of weights."""

    autotp: list[Case]
    shared: list[Shared]
    sequences: list[Case]
    copies: list[Case]
    rounding: Case


def run(name: str, cases: Cases, folder: Path) -> Any:
    """The run of that name: a case's own, or one of a mistake or a resume."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine_runs.seed_weights()
    heads_1 = dict(engine_runs._load_seeded_weights.weights)  # type: ignore[attr-defined]
    engine_runs.seed_weights(2)
    engine_runs._load_seeded_weights.weights |= heads_1  # type: ignore[attr-defined]
    shortly = replace(cases.copies[0], steps=5)
    others: dict[str, Callable[[], Any]] = {
        "refusals": lambda: run_refusals() | _refusals_after(cases.autotp[0]),
        "stale copies": lambda: _with_stale_copies(shortly),
        "copies resumed": lambda: run_resume(shortly, folder / "copies", 3),
        "cut off": run_cut_off,
        "unmarked": lambda: run_shared(Shared(replace(cases.shared[0].case, steps=2), marked=False)),
        "rounded": lambda: run_shared(Shared(cases.rounding)),
        "rounded apart": lambda: _rounded_apart(cases.rounding),
        "all-reduced": lambda: _all_reduced(cases.sequences[0]),
        "resumed": lambda: run_resume(replace(cases.autotp[0], steps=5), folder / "autotp", 3),
        "not shared": lambda: refused_resume(replace(cases.autotp[0], autotp=1), folder / "autotp", 3),
    }
    of_cases = {
        **{case.name: functools.partial(run_autotp, case) for case in cases.autotp},
        **{shared.case.name: functools.partial(run_shared, shared) for shared in cases.shared},
        **{case.name: functools.partial(run_sequence, case) for case in cases.sequences},
        **{case.name: functools.partial(run_second_copies, case) for case in cases.copies},
    }
    return (others | of_cases)[name]()


def _with_stale_copies(case: Case) -> Outcome:
    window.WindowedStage3.invalidate_secondary_tensor = lambda self: None
    return run_second_copies(case)


def _rounded_apart(case: Case) -> Outcome:
    fused.parallel.stream_rank = lambda parameter: dist.get_rank()  # type: ignore[assignment]
    return run_shared(Shared(case))


def _all_reduced(case: Case) -> Outcome:
    parallel.check = lambda engine: None
    return run_sequence(replace(case, steps=1, zero={"reduce_scatter": False}))


def _refusals_after(case: Case) -> dict[str, str]:
    """Those of a process that knows AutoTP by two."""
    run_autotp(replace(case, steps=1))
    found = {}
    for name, size, heads in (("too few heads", 2, 1), ("another size", 4, 4)):
        with fresh_groups():
            found[name] = refusal(
                lambda config, size=size: config.update(tensor_parallel={"autotp_size": size}),
                model=trajectory.build_model(layers=2, heads=heads),
            )
    return found
