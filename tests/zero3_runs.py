"""Bodies that run on real ranks: the engine's side of each test, returned as plain data for the parent to judge."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.comm import coalesced_collectives
from torch import Tensor

import lisa_ds
from tests import trajectory
from tests.trajectory import MICRO_BATCH, Case, Outcome


def build_engine(case: Case, *, shift: float = 0.0) -> Any:
    """A fresh LISA engine for ``case``; ``shift`` moves every initial weight, so that a resume has something to restore."""
    world_size = dist.get_world_size()
    config = trajectory.deepspeed_config(case, world_size)
    if case.dtype == "fp16":
        type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True
    with deepspeed.zero.Init(config_dict_or_path=config) if case.zero_init else contextlib.nullcontext():
        model = trajectory.build_model(case.tied, width=case.width)
    if case.zero_init:
        _load_seeded_weights(model, case)
    with torch.no_grad():
        for parameter in model.parameters() if shift else ():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=case.zero_init):
                parameter.data += shift
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    optimizer = torch.optim.AdamW(trajectory.parameter_groups(model), lr=1e-3, eps=trajectory.EPS)
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=trajectory.make_scheduler if case.scheduler else None,
        config=config,
        lisa_config=case.lisa_config,
    )
    return engine


def _load_seeded_weights(model: Any, case: Case) -> None:
    """zero.Init scatters random numbers in its own order: give it the weights the reference starts from."""
    if not hasattr(_load_seeded_weights, "weights"):
        raise AssertionError("call seed_weights() before any zero.Init")
    weights = _load_seeded_weights.weights[case.tied]  # type: ignore[attr-defined]
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(weights[name])


def seed_weights() -> None:
    _load_seeded_weights.weights = {  # type: ignore[attr-defined]
        tied: {n: p.detach().clone() for n, p in trajectory.build_model(tied).named_parameters()}
        for tied in (False, True)
    }


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """Every parameter, gathered, fp32."""
    result = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            result[name] = parameter.detach().float().clone()
    return result


@contextlib.contextmanager
def counted_reduce_scatter() -> Iterator[list[int]]:
    """Counts the bytes that enter reduce-scatter on this rank."""
    stock, count = coalesced_collectives.dist.reduce_scatter_fn, [0]

    def counting(output: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Any:
        count[0] += source.numel() * source.element_size()
        return stock(output, source, *args, **kwargs)

    coalesced_collectives.dist.reduce_scatter_fn = counting
    try:
        yield count
    finally:
        coalesced_collectives.dist.reduce_scatter_fn = stock


def train(
    engine: Any,
    case: Case,
    *,
    first: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Run ``case`` on this rank from step ``first``; losses are means over ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses, norms, layers = [], [], []
    for step, micro in enumerate(trajectory.micro_batches(case, world_size)):
        if step < first:
            continue
        layers.append(engine.sampled_layers)
        total = 0.0
        for batch in micro:
            rows = batch[rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
            loss = engine(input_ids=rows, labels=rows).loss
            total += loss.item() / case.accumulation
            if case.direct_backward:
                loss.backward()
            else:
                engine.backward(loss * float("inf") if case.overflow_at == step else loss)
            if batch is micro[-1]:
                on_step(step)
            engine.step()
        mean = torch.tensor([total])
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
        norms.append(float(engine.get_global_grad_norm()))
        after_step(step)
    return Outcome(losses, norms, full_parameters(engine), layers)


def run_case(case: Case) -> Outcome:
    """One trajectory, with the counters that its tests read in ``extra``."""
    engine = build_engine(case)
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    invalidations, in_flight = [0], [0]
    stock_invalidate, stock_fetch = coordinator._invalidate_trace, coordinator.fetch_sub_module

    def invalidate() -> Any:
        invalidations[0] += 1
        return stock_invalidate()

    def fetch(*args: Any, **kwargs: Any) -> Any:
        result = stock_fetch(*args, **kwargs)
        in_flight[0] = max(in_flight[0], len(engine.module.ds_inflight_param_registry))
        return result

    coordinator._invalidate_trace, coordinator.fetch_sub_module = invalidate, fetch
    reports, frozen_moved, calls_below, calls_at_lowest = [], [], [], []
    frozen: dict[str, Tensor] = {}
    calls = [0] * len(engine._stack.layers)
    handles = [
        # A module inside the block: transformers keeps the block's own hooks outside what it recomputes.
        block.input_layernorm.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, block in enumerate(engine._stack.layers)
    ]
    if case.drop_update_at is not None:
        stock_step = engine.optimizer._optimizer_step

        def step_but_one(sub_group: int) -> None:
            if not (engine._step_in_lisa == case.drop_update_at and sub_group == 0):
                stock_step(sub_group)

        engine.optimizer._optimizer_step = step_but_one

    bytes_at_start = [0]

    def on_step(step: int) -> None:
        applied = engine._step_in_lisa
        parameters = dict(engine.module.named_parameters())
        if applied % case.interval_steps == 0:
            frozen.clear()
            frozen.update({n: p.ds_tensor.clone() for n, p in parameters.items() if not p.requires_grad})
        lowest = min(engine.sampled_layers, default=0)
        calls_below.append(calls[:lowest])
        calls_at_lowest.append(calls[lowest])
        calls[:] = [0] * len(calls)
        reports.append(
            {
                "layers": engine.sampled_layers,
                "report": engine.memory_report(),
                "reduced": count[0] - bytes_at_start[0],
                "gradients_none": all(p.grad is None for p in parameters.values()),
            }
        )
        bytes_at_start[0] = count[0]

    def after_step(step: int) -> None:
        parameters = dict(engine.module.named_parameters())
        for name, before in frozen.items():
            if not torch.equal(parameters[name].ds_tensor.view(torch.int8), before.view(torch.int8)):
                frozen_moved.append((step, name))

    with counted_reduce_scatter() as count:
        outcome = train(engine, case, on_step=on_step, after_step=after_step)
    for handle in handles:
        handle.remove()
    outcome.extra = {
        "history": engine.layer_history,
        "interval": engine.interval,
        "applied": engine._step_in_lisa,
        "skipped": engine.skipped_steps,
        "invalidations": invalidations[0],
        "in_flight": in_flight[0],
        "trace_complete": coordinator.is_complete_trace(),
        "reports": reports,
        "frozen_moved": frozen_moved,
        "calls_below": calls_below,
        "calls_at_lowest": calls_at_lowest,
        "accumulation_dtype": str(engine.optimizer.gradient_accumulation_dtype),
        "hooks": len(engine.optimizer._grad_acc_hooks),
    }
    engine.destroy()
    return outcome


def run_cases(cases: list[Case]) -> dict[str, Outcome]:
    """All ``cases``, one after another on the same ranks."""
    deepspeed.init_distributed(dist_backend="gloo")
    seed_weights()
    return {case.name: run_case(case) for case in cases}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_many_switches(case: Case, switches: int) -> list[dict[str, Any]]:
    """Train one step, switch, and so on; what is alive after each fifth switch."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine = build_engine(case)
    rank = dist.get_rank()
    rows = next(trajectory.micro_batches(case, dist.get_world_size()))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    seen = []
    for step in range(switches + 1):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()  # interval_steps is 1: this also switches
        if step % 5:  # looking at every object of the process takes longer than the step
            continue
        gc.collect()
        seen.append(
            {
                "report": engine.memory_report(),
                "resident": resident_bytes(),
                "hooks": len(engine.optimizer._grad_acc_hooks),
                "tensors": sum(1 for thing in gc.get_objects() if isinstance(thing, Tensor)),
                "states": len(engine.optimizer.optimizer.state),
                "layers": engine.sampled_layers,
                "switches": len(engine.layer_history) - 1,
            }
        )
    return seen


def run_activations(case: Case) -> dict[str, Any]:
    """Bytes saved for backward, and the loss: stock engine, ours with all blocks, ours with 2 of 8."""
    deepspeed.init_distributed(dist_backend="gloo")
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config)

    draw = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randint(0, 512, (4, 64), generator=draw)
    config = trajectory.deepspeed_config(case, dist.get_world_size())

    def measure(engine: Any) -> tuple[int, list[float]]:
        losses, saved = [], 0
        own = {parameter.data_ptr() for parameter in engine.module.parameters()}
        for _ in range(2):
            storages: dict[int, int] = {}

            def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
                if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in own:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = engine(input_ids=rows, labels=rows).loss
            saved = sum(storages.values())
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return saved, losses

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    result = {}
    full = model()
    stock, *_ = deepspeed.initialize(model=full, optimizer=optimizer(full), config=config)
    result["stock, 8 of 8"] = measure(stock)
    stock.destroy()
    part = model()
    for block in part.model.layers[2:]:
        block.requires_grad_(False)
    stock, *_ = deepspeed.initialize(model=part, optimizer=optimizer(part), config=config)
    result["stock, 2 of 8"] = measure(stock)
    stock.destroy()
    for name, layers in (("ours, 8 of 8", range(8)), ("ours, 2 of 8", range(2))):
        ours = model()
        engine, *_ = lisa_ds.initialize(
            model=ours,
            optimizer=optimizer(ours),
            config=config,
            lisa_config={"interval_steps": 1000, "sampler": {"name": "fixed", "layers": list(layers)}},
        )
        result[name] = measure(engine)
        engine.destroy()
    return result


def run_resume(case: Case, folder: Path, save_after: list[int]) -> dict[int | str, Outcome]:
    """An uninterrupted run that saves after some steps, and one resumed from each of them in a fresh engine."""
    deepspeed.init_distributed(dist_backend="gloo")
    seed_weights()
    engine = build_engine(case)

    def save(step: int) -> None:
        if step + 1 in save_after:
            engine.save_checkpoint(str(folder), tag=f"after{step + 1}", client_state={"mine": step})

    outcomes: dict[int | str, Outcome] = {"uninterrupted": train(engine, case, after_step=save)}
    outcomes["uninterrupted"].extra = {"history": engine.layer_history, "state": moments(engine)}
    engine.destroy()
    for steps in save_after:
        engine = build_engine(case, shift=0.5)
        path, client_state = engine.load_checkpoint(str(folder), tag=f"after{steps}")
        outcomes[steps] = train(engine, case, first=steps)
        outcomes[steps].extra = {
            "path": path,
            "mine": client_state["mine"],
            "history": engine.layer_history,
            "state": moments(engine),
        }
        engine.destroy()
    return outcomes


def moments(engine: Any) -> list[Tensor]:
    """Master weights and moments of this rank, in the order of the window."""
    optimizer = engine.optimizer
    masters = optimizer.fp32_partitioned_groups_flat
    states = [optimizer.optimizer.state.get(master, {}) for master in masters]
    tensors = [master.detach() for master in masters]
    tensors += [state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step") if key in state]
    return [tensor.clone() for tensor in tensors]


def run_bad_checkpoints(case: Case, folder: Path) -> dict[str, str]:
    """The message of each way a checkpoint can be bad; the engine must be unharmed by all of them."""
    from lisa_ds.errors import CheckpointError

    deepspeed.init_distributed(dist_backend="gloo")
    engine = build_engine(case)
    engine.save_checkpoint(str(folder), tag="good")
    before = full_parameters(engine)
    rank = dist.get_rank()
    if rank == 0:
        for tag in ("truncated", "incomplete", "foreign", "of_three_ranks", "deeper"):
            shutil.copytree(folder / "good", folder / tag)
        model_file = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
        optimizer_file = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        whole = (folder / "truncated" / optimizer_file.format(1)).read_bytes()
        (folder / "truncated" / optimizer_file.format(1)).write_bytes(whole[: len(whole) // 2])
        (folder / "incomplete" / model_file.format(1)).unlink()
        shutil.copy(
            folder / "of_three_ranks" / optimizer_file.format(0), folder / "of_three_ranks" / optimizer_file.format(2)
        )
        for tag, change in (("foreign", lambda saved: saved.pop("lisa")), ("deeper", _pretend_deeper)):
            for each in range(2):
                file = folder / tag / model_file.format(each)
                saved = torch.load(file, weights_only=False)
                change(saved)
                torch.save(saved, file)
    dist.barrier()
    messages = {}
    for tag in ("missing", "truncated", "incomplete", "foreign", "of_three_ranks", "deeper", None):
        try:
            engine.load_checkpoint(str(folder if tag else folder / "nowhere"), tag=tag)
            messages[str(tag)] = ""
        except CheckpointError as error:
            messages[str(tag)] = str(error)
    other = build_engine(replace(case, lisa={"rest": "never"}))
    try:
        other.load_checkpoint(str(folder), tag="good")
    except CheckpointError as error:
        messages["policies"] = str(error)
    after = full_parameters(engine)
    messages["unharmed"] = str(all(torch.equal(after[name], value) for name, value in before.items()))
    return messages


def _pretend_deeper(saved: dict[str, Any]) -> None:
    saved["lisa"]["num_layers"] = 9


def run_stock_toggling() -> dict[str, Any]:
    """What stock ZeRO-3 does when ``requires_grad`` is toggled after initialisation."""
    deepspeed.init_distributed(dist_backend="gloo")
    case = Case("stock", clip=1.0)
    rank = dist.get_rank()
    rows = next(trajectory.micro_batches(case, dist.get_world_size()))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    result: dict[str, Any] = {}

    def steps(engine: Any) -> None:
        for _ in range(3):
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()

    for kind in ("freeze", "unfreeze"):
        model = trajectory.build_model()
        block = model.model.layers[3]
        if kind == "unfreeze":
            block.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=trajectory.deepspeed_config(case, dist.get_world_size())
        )
        steps(engine)
        block.requires_grad_(kind == "unfreeze")
        before = [parameter.ds_tensor.clone() for parameter in block.parameters()]
        steps(engine)
        after = [parameter.ds_tensor for parameter in block.parameters()]
        result[kind] = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
        result[f"{kind}, gradients left"] = sum(p.grad is not None for p in block.parameters())
        engine.destroy()
    return result


def run_beside_a_reference_model() -> dict[str, Any]:
    """A policy under LISA and a reference model under a stock engine in one process, as DPO has them."""
    from lisa_ds.engines.zero3 import LisaEngine, armed
    from lisa_ds.engines.zero3.linear import FrozenAwareLinear

    deepspeed.init_distributed(dist_backend="gloo")
    stock_engine = deepspeed.DeepSpeedEngine
    case = Case("dpo")
    config = trajectory.deepspeed_config(case, dist.get_world_size())
    rank = dist.get_rank()
    rows = next(trajectory.micro_batches(case, dist.get_world_size()))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    policy, reference = trajectory.build_model(), trajectory.build_model()

    def build(model: Any) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    with armed(lambda model: model is policy, lisa_ds.LisaConfig(num_sampled_layers=1, interval_steps=2)):
        # While armed, isinstance checks against the rebound name must see both kinds.
        other, engine = build(reference), build(policy)
        seen_as_engines = all(isinstance(each, deepspeed.DeepSpeedEngine) for each in (other, engine))
        late = build(trajectory.build_model())
    restored = deepspeed.DeepSpeedEngine is stock_engine
    try:
        with armed(lambda model: True, lisa_ds.LisaConfig()):
            raise KeyError("anything")
    except KeyError:
        restored_after_error = deepspeed.DeepSpeedEngine is stock_engine
    before = full_parameters(other)
    forgetful: set[int] = set()
    stock_context = FrozenAwareLinear.setup_context

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        forgetful.add(id(inputs[1]))
        stock_context(ctx, inputs, output)

    FrozenAwareLinear.setup_context = staticmethod(remember)
    other.backward(other(input_ids=rows, labels=rows).loss)  # never stepped
    for _ in range(4):
        with torch.no_grad():
            expected = other(input_ids=rows, labels=rows).loss
        engine.backward(engine(input_ids=rows, labels=rows).loss - expected)
        engine.step()
    after = full_parameters(other)
    moved = full_parameters(engine)
    kinds = [type(each).__name__ for each in (engine, other, late)]
    optimizers = [type(each.optimizer).__name__ for each in (engine, other, late)]
    engine.destroy()
    return {
        "kinds": kinds,
        "optimizers": optimizers,
        "lisa": isinstance(engine, LisaEngine),
        "seen_as_engines": seen_as_engines,
        "restored": restored and restored_after_error,
        "reference_unmoved": all(torch.equal(after[n], p) for n, p in before.items()),
        "reference_trainable": all(p.requires_grad for p in reference.parameters()),
        "policy_moved": sum(not torch.equal(moved[n], p) for n, p in before.items()),
        "forgetful_in_reference": len(forgetful.intersection(map(id, reference.parameters()))),
        "forgetful_in_policy": len(forgetful.intersection(map(id, policy.parameters()))),
        "linear_restored": torch.nn.functional.linear.__name__ == "zero3_linear_wrap",
    }


def run_warm_starts(case: Case, folder: Path) -> dict[str, Any]:
    """Load the weights alone, by both of DeepSpeed's options, from the latest tag and from an older one."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine = build_engine(case)
    saved = {}
    for tag in ("old", "new"):
        train(engine, replace(case, steps=5))
        engine.save_checkpoint(str(folder), tag=tag)
        saved[tag] = full_parameters(engine)
    engine.destroy()
    result = {}
    for tag in ("old", "new"):
        for option in ({"load_module_only": True}, {"load_optimizer_states": False}):
            engine = build_engine(case, shift=0.5)
            train(engine, replace(case, steps=4))  # past a switch: the sampled set is not the first one
            engine.load_checkpoint(str(folder), tag=tag, **option)
            loaded = full_parameters(engine)
            key = f"{tag}, {next(iter(option))}"
            result[key] = [name for name, value in saved[tag].items() if not torch.equal(loaded[name], value)]
            result[f"{key}, history"] = engine.layer_history
            result[f"{key}, states"] = len(engine.optimizer.optimizer.state)
            result[f"{key}, masters"] = all(
                torch.equal(master.view(torch.int32), flat.float().view(torch.int32))  # padding may be NaN
                for master, flat in zip(
                    engine.optimizer.fp32_partitioned_groups_flat,
                    engine.optimizer.fp16_partitioned_groups_flat,
                    strict=True,
                )
            )
            result[f"{key}, then"] = train(engine, replace(case, steps=2)).losses
            engine.destroy()
    result["differ"] = any(not torch.equal(saved["old"][name], value) for name, value in saved["new"].items())
    return result


def run_two_stacks() -> dict[str, Any]:
    """T5 and BERT with frozen embeddings: reentrant checkpointing must not change what is learned."""
    from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

    deepspeed.init_distributed(dist_backend="gloo")

    def t5() -> Any:
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=64,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=3,
                num_heads=2,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        )

    def bert() -> Any:
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (2, 8), generator=draw)
    result = {}
    for name, build, labels in (("t5", t5, rows), ("bert", bert, torch.tensor([0, 1]))):
        runs = []
        for checkpointing in ("", "reentrant"):
            torch.manual_seed(0)
            model = build()
            case = Case(name, checkpointing=checkpointing)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": True})
            engine, *_ = lisa_ds.initialize(
                model=model,
                optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, eps=trajectory.EPS),
                config=trajectory.deepspeed_config(case, dist.get_world_size()),
                lisa_config={"num_sampled_layers": 1, "interval_steps": 1, "embeddings": "never", "sampler": "cyclic"},
            )
            before = full_parameters(engine)
            losses = []
            for _ in range(len(engine._stack.layers)):
                loss = engine(input_ids=rows, labels=labels).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            after = full_parameters(engine)
            blocks = {
                engine._stack.unit_of[id(p)]
                for n, p in model.named_parameters()
                if not torch.equal(after[n], before[n])
            }
            runs.append((losses, after, {block for block in blocks if isinstance(block, int)}))
            engine.destroy()
        (plain, first, _), (checkpointed, second, moved) = runs
        result[name] = {
            "loss": max(abs(a - b) for a, b in zip(plain, checkpointed, strict=True)),
            "parameter": max(float((first[n] - second[n]).abs().max()) for n in first),
            "moved": sorted(moved),
        }
    return result


def run_with_frozen_parameters() -> dict[str, Any]:
    """A model of which the user has frozen a part, and whose ``requires_grad`` an adapter library turns on again."""
    from lisa_ds.memory import Precision, state_bytes

    deepspeed.init_distributed(dist_backend="gloo")
    case = Case("frozen", interval_steps=2)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = next(trajectory.micro_batches(case, world_size))[0][rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH]
    model = trajectory.build_model()
    for block in model.model.layers:
        block.self_attn.requires_grad_(False)
    engine, *_ = lisa_ds.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=trajectory.deepspeed_config(case, world_size),
        lisa_config=case.lisa_config,
    )
    before = full_parameters(engine)
    for _ in range(2):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
    report = engine.memory_report()
    planned = state_bytes(
        engine.model_shape,
        sampled=engine.sampled_layers,
        world_size=world_size,
        precision=Precision(4, 4, bucket_bytes=report["buckets"]),
    )
    for block in model.model.layers:  # as PEFT's disable_adapter leaves it
        block.mlp.requires_grad_(True)
    for _ in range(3):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    after = full_parameters(engine)
    return {
        "bytes_as_planned": report == planned,
        "frozen_moved": [n for n in before if "self_attn" in n and not torch.equal(before[n], after[n])],
        "frozen_requires_grad": [n for n, p in model.named_parameters() if "self_attn" in n and p.requires_grad],
        "moved": sum("mlp" in n and not torch.equal(before[n], after[n]) for n in before),
    }
