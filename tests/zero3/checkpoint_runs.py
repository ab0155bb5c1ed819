"""What the ranks of tests/zero3/test_checkpoint.py do."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lisa_ds
from lisa_ds.errors import CheckpointError
from tests.zero3.engine_runs import build_engine, full_parameters, seed_weights, train
from tests.zero3.trajectory import Case, Outcome


def run_resume(case: Case, folder: Path, save_after: list[int]) -> dict[int | str, Outcome]:
    """An uninterrupted run that saves after some steps, and one resumed from each of them in a fresh engine."""
    deepspeed.init_distributed(dist_backend="gloo")
    seed_weights()
    engine = build_engine(case)
    roles = [engine.sampled_roles]

    def save(step: int) -> None:
        roles.append(engine.sampled_roles)
        if step + 1 in save_after:
            engine.save_checkpoint(str(folder), tag=f"after{step + 1}", client_state={"mine": step})

    outcomes: dict[int | str, Outcome] = {"uninterrupted": train(engine, case, after_step=save)}
    outcomes["uninterrupted"].extra = {**where(engine), "roles": roles}
    engine.destroy()
    runs: list[int | str] = [*save_after, *(["forgetful"] if "rewarm_steps" in case.lisa else [])]
    for name in runs:
        steps = name if isinstance(name, int) else save_after[-1]
        engine = build_engine(case, shift=0.5)
        path, client_state = engine.load_checkpoint(str(folder), tag=f"after{steps}")
        if name == "forgetful":
            engine.optimizer._rewarm.begin_anew()
            engine.optimizer._growth_limit.begin_anew()
        resumed_roles = [engine.sampled_roles]
        outcomes[name] = train(
            engine,
            case,
            first=steps,
            after_step=lambda step, roles=resumed_roles, engine=engine: roles.append(engine.sampled_roles),
        )
        outcomes[name].extra = {
            **where(engine),
            "path": path,
            "mine": client_state["mine"],
            "roles": resumed_roles,
        }
        engine.destroy()
    return outcomes


def not_whole(engine: Any) -> list[str]:
    """Of the small parameters that stay whole on every rank, those that do not, or hold something else than their parts."""
    here = {n: p.detach().float().clone() for n, p in engine.module.named_parameters() if p.ds_persist}
    assert here
    parts = full_parameters(engine)
    return [name for name, value in here.items() if not torch.equal(value, parts[name])]


def where(engine: Any) -> dict[str, Any]:
    """Where a run stands."""
    return {
        "history": engine.layer_history,
        "state": moments(engine),
        "care": (engine.optimizer._rewarm.state_dict(), engine.optimizer._growth_limit.state_dict()),
    }


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
    deepspeed.init_distributed(dist_backend="gloo")
    engine = build_engine(case)
    engine.save_checkpoint(str(folder), tag="good")
    before = full_parameters(engine)
    rank = dist.get_rank()
    if rank == 0:
        for tag in ("truncated", "incomplete", "foreign", "of_three_ranks", "deeper", "older", "groups"):
            shutil.copytree(folder / "good", folder / tag)
        model_file = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
        optimizer_file = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        whole = (folder / "truncated" / optimizer_file.format(1)).read_bytes()
        (folder / "truncated" / optimizer_file.format(1)).write_bytes(whole[: len(whole) // 2])
        (folder / "incomplete" / model_file.format(1)).unlink()
        shutil.copy(
            folder / "of_three_ranks" / optimizer_file.format(0), folder / "of_three_ranks" / optimizer_file.format(2)
        )
        for tag, name, change in (
            ("foreign", model_file, lambda saved: saved.pop("lisa")),
            ("deeper", model_file, _pretend_deeper),
            ("older", model_file, lambda saved: saved["lisa"].pop("roles")),
            ("older", optimizer_file, _pretend_older),
            ("groups", optimizer_file, _drop_half_of_the_groups),
        ):
            for each in range(2):
                file = folder / tag / name.format(each)
                saved = torch.load(file, weights_only=False)
                change(saved)
                torch.save(saved, file)
    dist.barrier()
    messages = {}
    for tag in ("missing", "truncated", "incomplete", "foreign", "of_three_ranks", "deeper", "older", "groups", None):
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
    messages["older roles"] = str(engine.sampled_roles)
    other = build_engine(replace(case, lisa={"lm_head": {"every": 2}}))
    try:
        other.load_checkpoint(str(folder), tag="good")
    except CheckpointError as error:
        messages["other policies"] = str(error)
    after = full_parameters(engine)
    messages["unharmed"] = str(all(torch.equal(after[name], value) for name, value in before.items()))
    return messages


def _pretend_older(saved: dict[str, Any]) -> None:
    for key in ("roles", "care"):
        saved["optimizer_state_dict"]["lisa"].pop(key)


def _drop_half_of_the_groups(saved: dict[str, Any]) -> None:
    groups = saved["optimizer_state_dict"]["fp32_flat_groups"]
    del groups[len(groups) // 2 :]


def _pretend_deeper(saved: dict[str, Any]) -> None:
    saved["lisa"]["num_layers"] = 9


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
            key = f"{tag}, {next(iter(option))}"
            result[f"{key}, not whole"] = not_whole(engine)
            loaded = full_parameters(engine)
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
    engine = build_engine(case, shift=0.5)
    with contextlib.suppress(CheckpointError):
        engine.load_checkpoint(str(folder), tag="no such", load_module_only=True)
    result["refused, not whole"] = not_whole(engine)
    engine.load_checkpoint(str(folder), tag="new")
    result["resumed, not whole"] = not_whole(engine)
    result["differ"] = any(not torch.equal(saved["old"][name], value) for name, value in saved["new"].items())
    return result


class Small(nn.Module):
    """Two blocks, a buffer that is saved, and one that is not."""

    def __init__(self, value: float = 0.0, outputs: int = 11, more: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, outputs)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(8)) if more else None
        self.register_buffer("seen", torch.full((3,), value))
        self.register_buffer("table", torch.full((3,), value), persistent=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def run_warm_starts_of_others(folder: Path) -> dict[str, Any]:
    """Load the weights alone into a model whose buffers have other values, and into other models."""
    deepspeed.init_distributed(dist_backend="gloo")

    def engine_of(**changes: Any) -> Any:
        model = Small(**changes)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        lisa = {"num_sampled_layers": 1, "interval_steps": 1}
        optimizer = torch.optim.AdamW(model.parameters())
        return lisa_ds.initialize(model=model, optimizer=optimizer, config=config, lisa_config=lisa)[0]

    engine_of(value=5.0).save_checkpoint(str(folder), tag="saved")
    engine = engine_of(value=float(dist.get_rank()))
    engine.load_checkpoint(str(folder), tag="saved", load_module_only=True)
    result = {name: buffer.tolist() for name, buffer in engine.module.named_buffers()}
    for name, changes in (("shape", {"outputs": 12}), ("name", {"more": True})):
        engine = engine_of(**changes)
        before = full_parameters(engine)
        try:
            engine.load_checkpoint(str(folder), tag="saved", load_module_only=True)
        except CheckpointError as error:
            result[name] = str(error)
        after = full_parameters(engine)
        result[f"{name}, unharmed"] = all(torch.equal(after[at], value) for at, value in before.items())
    return result
