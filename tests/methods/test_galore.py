"""GaLore's optimizer in a trainer: held to transformers' own, and to itself in other formats."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lisa_ds.integrations import galore
from tests import tiny

pytest.importorskip("galore_torch")

PROJECTION = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
AS_TEXT = "rank=4,update_proj_gap=3,scale=0.5,proj_type=std"
LIKE_TRANSFORMERS = {"adam_epsilon": 1e-6, "weight_decay": 0.0}  # it gives GaLore neither: these are its defaults


def linears(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name}


def as_transformers(layerwise: bool) -> dict[str, str]:
    name = "galore_adamw_layerwise" if layerwise else "galore_adamw"
    return {"optim": name, "optim_args": AS_TEXT, "optim_target_modules": r".*layers.*_proj"}


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(4, 260, (64, 12), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class _Weights(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})


def trainer(folder: Path, ours: dict[str, Any] | None, **changes: Any) -> tuple[Trainer, _Weights]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config())
    given = {"max_steps": 8, "learning_rate": 1e-2, "warmup_steps": 3, "max_grad_norm": 0.0, "save_strategy": "no"}
    given |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, **changes}
    args = TrainingArguments(str(folder), **given)
    watch = _Weights()
    made = Trainer(model, args, train_dataset=_Rows(), callbacks=[watch])
    if ours is not None:
        targets = [module.weight for module in linears(model).values()]
        galore.install(made, targets, **{"projection": PROJECTION, "int8": False, "layerwise": False, **ours})
    return made, watch


def trained(folder: Path, ours: dict[str, Any] | None, **changes: Any) -> list[dict[str, Tensor]]:
    made, watch = trainer(folder, ours, **changes)
    made.train()
    return watch.seen


def largest_difference(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> float:
    assert len(one) == len(other) == 8
    return max((a[name] - b[name]).abs().max().item() for a, b in zip(one, other, strict=True) for name in a)


@pytest.mark.parametrize("layerwise", [False, True])
def test_steps_are_those_of_transformers_to_the_bit(tmp_path: Path, layerwise: bool) -> None:
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0} if layerwise else {}
    ours = trained(tmp_path, {"layerwise": layerwise}, **LIKE_TRANSFORMERS, **constant)
    theirs = trained(tmp_path, None, **LIKE_TRANSFORMERS, **constant, **as_transformers(layerwise))
    assert largest_difference(ours, theirs) == 0.0
    full = trained(tmp_path, None, **LIKE_TRANSFORMERS, **constant)  # control
    assert largest_difference(ours, full) > 1e-3


def test_layerwise_steps_have_the_scheduled_rate_and_in_transformers_have_not(tmp_path: Path) -> None:
    ours, at_once = (trained(tmp_path, {"layerwise": layerwise}, **LIKE_TRANSFORMERS) for layerwise in (True, False))
    assert largest_difference(ours, at_once) == 0.0
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    scheduled, unscheduled = (
        trained(tmp_path, None, **LIKE_TRANSFORMERS, **as_transformers(True), **more) for more in ({}, constant)
    )
    first = [(scheduled[0][name] - unscheduled[0][name]).abs().max().item() for name in scheduled[0]]
    assert max(first) == 0.0  # the first step of a warm-up, whose rate is 0


@pytest.mark.parametrize("change", [{"weight_decay": 0.5}, {"adam_beta1": 0.5}, {"adam_epsilon": 1e-2}])
def test_what_training_says_of_adamw_has_an_effect_and_in_transformers_has_none(
    tmp_path: Path, change: dict[str, float]
) -> None:
    base, changed = (trained(tmp_path, {}, **{**LIKE_TRANSFORMERS, **more}) for more in ({}, change))
    assert largest_difference(base, changed) > 1e-4
    asked = as_transformers(False)
    base, changed = (trained(tmp_path, None, **{**LIKE_TRANSFORMERS, **more}, **asked) for more in ({}, change))
    assert largest_difference(base, changed) == 0.0  # why it is built here


def test_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, {}, weight_decay=0.5)
    optimizer = made.create_optimizer()
    names = {id(p): name for name, p in made.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0.5) == ("norm" not in names[id(parameter)])
            assert ("rank" in group) == ("_proj" in names[id(parameter)])


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_8_bit_moments_follow_those_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layerwise: bool, proj_type: str
) -> None:
    projection = {**PROJECTION, "proj_type": proj_type}
    wide = trained(tmp_path, {"projection": projection})
    monkeypatch.setattr(galore, "SMALLEST_INT8", 10**9)  # nothing is large enough: the arithmetic alone
    same = trained(tmp_path, {"projection": projection, "int8": True, "layerwise": layerwise})
    assert largest_difference(wide, same) == 0.0
    monkeypatch.setattr(galore, "SMALLEST_INT8", 64)
    made, watch = trainer(tmp_path, {"projection": projection, "int8": True, "layerwise": layerwise})
    made.train()
    moved = torch.stack([(wide[-1][n] - wide[0][n]).norm() for n in wide[-1]]).norm().item()
    apart = torch.stack([(wide[-1][n] - watch.seen[-1][n]).norm() for n in wide[-1]]).norm().item()
    assert 0 < apart < 0.1 * moved
    monkeypatch.setattr(galore, "GALORE_CHUNK", 256)  # a part of every matrix
    parts = trained(tmp_path, {"projection": projection, "int8": True, "layerwise": layerwise})
    assert largest_difference(parts, watch.seen) == 0.0
    state = made.optimizer.optimizer.state[made.model.model.embed_tokens.weight]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)


@pytest.mark.parametrize("ours", [{}, {"int8": True}, {"layerwise": True}, {"layerwise": True, "int8": True}])
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: dict[str, Any]) -> None:
    monkeypatch.setattr(galore, "SMALLEST_INT8", 64)
    whole = trained(tmp_path / "whole", ours)
    made, _ = trainer(tmp_path / "part", ours, save_strategy="steps", save_steps=4)
    made.train()
    made, watch = trainer(tmp_path / "part", ours)
    made.train(resume_from_checkpoint=str(tmp_path / "part/checkpoint-4"))
    for after, again in zip(whole[4:], watch.seen, strict=True):
        assert all(torch.equal(after[name], again[name]) for name in after)


def test_one_gradient_at_a_time_is_alive_layerwise(tmp_path: Path) -> None:
    alive: dict[bool, int] = {}
    for layerwise in (False, True):
        made, _ = trainer(tmp_path, {"layerwise": layerwise}, max_steps=2)
        parameters = list(made.model.parameters())
        most = [0]

        def count(_: Tensor, parameters: Any = parameters, most: Any = most) -> None:
            most[0] = max(most[0], sum(p.grad is not None for p in parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)
        made.train()
        alive[layerwise] = most[0]
    assert alive == {False: len(parameters), True: 1}


def test_state_is_copied_and_not_shared(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, {"int8": True}, max_steps=2)
    made.train()
    state = copy.deepcopy(made.optimizer.optimizer.state_dict())
    made.optimizer.optimizer.load_state_dict(state)
    moments = [v for held in made.optimizer.optimizer.state.values() for v in held.values() if torch.is_tensor(v)]
    given = {v.data_ptr() for held in state["state"].values() for v in held.values() if torch.is_tensor(v)}
    assert not given & {v.data_ptr() for v in moments}
