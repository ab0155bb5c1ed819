"""The life of a unit's state: built when it comes in, released by a policy, restored exactly, forgotten, counted. No ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_ds.engines.common.growth_limit import NormGrowthLimit
from lisa_ds.engines.common.rewarm import Rewarm
from lisa_ds.engines.zero3.state.count import state_bytes
from lisa_ds.engines.zero3.state.release import Drop, Release
from lisa_ds.engines.zero3.state.unit_state import UnitState
from lisa_ds.layers import Unit
from lisa_ds.optim import StateFormat

UNITS: list[Unit] = ["embeddings", 0, 0, 1, "lm_head"]  # block 0 lies in two parameter groups
SIZES = [6, 300, 5, 7, 4]


class Stage3:
    """As far as state is concerned: 16-bit weights by sub-group, and masters made of them."""

    def __init__(self, *, copies: bool = True) -> None:
        self.weights = [torch.arange(size, dtype=torch.bfloat16) for size in SIZES]
        self.built: list[list[int]] = []
        self._copies = copies

    def create(self, sub_groups: Sequence[int]) -> list[Tensor]:
        self.built.append(list(sub_groups))
        return [self.weights[i].float() if self._copies else self.weights[i].detach() for i in sub_groups]


class Keep:
    """A policy that keeps everything, as one on the host would: it needs nothing but what it is told."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def leaves(self, sub_group: int, master: Tensor, moments: dict[str, Any]) -> None:
        self.kept[sub_group] = (master.clone(), {key: value.clone() for key, value in moments.items()})

    def returns(self, sub_group: int, master: Tensor) -> dict[str, Any]:
        if sub_group not in self.kept:
            return {}
        saved, moments = self.kept.pop(sub_group)
        master.copy_(saved)
        return moments

    def forget(self) -> None:
        self.kept.clear()

    def parked_bytes(self) -> dict[str, int]:
        states = [moments for _, moments in self.kept.values()]
        return {"parked_host": sum(state_bytes([m for m, _ in self.kept.values()], states).values()), "parked_nvme": 0}


class Life:
    def __init__(self, *, moments: str = "fp32", copies: bool = True, release: Release | None = None, **more: Any):
        self.stage3 = Stage3(copies=copies)
        self.optimizer = torch.optim.AdamW([torch.zeros(1)])
        self.rewarm, self.limit = Rewarm(4), NormGrowthLimit(1.5)
        precision = "mixed" if copies else "stochastic_rounding"
        self.state = UnitState(
            self.optimizer,
            UNITS,
            self.stage3.weights,
            create=self.stage3.create,
            state_format=StateFormat(precision, moments),
            rewarm=self.rewarm,
            growth_limit=self.limit,
            release=release or Drop(),
            **more,
        )

    def step(self) -> None:
        """What a step leaves behind: every live master moves, and its moments are there."""
        for i in range(len(UNITS)):
            for master in self.state.masters([i]):
                master += 0.125
                moments = self.state.moments_of(i, [SIZES[i]])
                moments["exp_avg"] += 1
                moments["step"] += 1
        self.rewarm.stepped()

    def steps_of(self, unit: Unit) -> list[float]:
        return [float(piece["step"]) if "step" in piece else 0.0 for piece in self.state.of(unit)]


def test_what_stays_keeps_its_state_and_what_leaves_is_dropped() -> None:
    life = Life()
    life.state.train(["embeddings", 0])
    life.step()
    stays = life.state.masters([0])[0]
    assert (life.steps_of("embeddings"), life.steps_of(0), life.steps_of(1)) == ([1.0], [1.0, 1.0], [])
    life.state.train(["embeddings", 1])
    assert life.stage3.built == [[0, 1, 2], [3]]  # of what stays nothing is built
    assert life.state.masters(range(5))[0] is stays
    assert (life.steps_of("embeddings"), life.steps_of(0), life.steps_of(1)) == ([1.0], [], [0.0])
    assert len(life.optimizer.state) == 1
    life.state.train(["embeddings", 0])
    assert life.steps_of(0) == [0.0, 0.0]
    assert torch.equal(life.state.masters([1])[0], life.stage3.weights[1].float())  # anew, of the 16-bit weights


def test_drop_leaves_nothing_alive() -> None:
    import gc
    import weakref

    life = Life(release=Drop())
    life.state.train([0])
    life.step()
    state = [life.state.masters([1])[0], *life.state.moments_of(1, [SIZES[1]]).values()]
    gone = [weakref.ref(tensor) for tensor in state]
    del state
    life.state.train([1])
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_what_leaves_is_free_before_what_comes_in_is_built() -> None:
    import weakref

    life = Life()
    life.state.train([0])
    life.step()
    old = weakref.ref(life.state.masters([1])[0])
    seen = []
    create = life.stage3.create

    def watch(sub_groups: Sequence[int]) -> list[Tensor]:
        seen.append(old())
        return create(sub_groups)

    life.state._create = watch
    life.state.train([1])
    assert seen == [None]


def test_another_policy_slots_in() -> None:
    life = Life(release=Keep())
    life.state.train(["embeddings", 0])
    life.step()
    live = life.state.bytes()
    assert live["parked_host"] == 0
    master = life.state.masters([1])[0].clone()
    life.state.train(["embeddings", 1])
    parked = life.state.bytes()["parked_host"]
    assert parked == 3 * 4 * (SIZES[1] + SIZES[2])
    life.state.train(["embeddings", 0])
    assert life.steps_of(0) == [1.0, 1.0]
    assert torch.equal(life.state.masters([1])[0], master)  # its low bits too
    assert life.state.bytes() == live | {"parked_host": 4 * SIZES[3]}  # block 1 has taken no step
    life.state.train([1])
    life.state.forget_moments()
    life.state.train([0])
    assert life.steps_of(0) == [0.0, 0.0]


@pytest.mark.parametrize(("moments", "each"), [("fp32", 4), ("int8", 1)])
def test_bytes_are_those_of_storages(moments: str, each: int) -> None:
    life = Life(moments=moments)
    life.state.train([0, "lm_head"])
    elements = SIZES[1] + SIZES[2] + SIZES[4]
    none = {"exp_avg": 0, "exp_avg_sq": 0, "parked_host": 0, "parked_nvme": 0}
    assert life.state.bytes() == {"master": 4 * elements, **none}
    assert not life.state.has_moments
    life.step()
    scales = 4 * (2 + 1 + 1) if moments == "int8" else 0  # one for each 256 elements that are begun
    moment = each * elements + scales
    assert life.state.bytes() == {"master": 4 * elements, **none, "exp_avg": moment, "exp_avg_sq": moment}
    assert life.state.has_moments
    life.state.train([0, 1, "lm_head"])
    assert not life.state.has_moments


def test_weights_that_are_updated_themselves_are_no_master() -> None:
    life = Life(copies=False, moments="bf16")
    life.state.train([0])
    life.step()
    assert life.state.bytes()["master"] == 0
    assert [sorted(piece) for piece in life.state.of(0)] == [["exp_avg", "exp_avg_sq", "step"]] * 2
    assert life.state.masters([1])[0].data_ptr() == life.stage3.weights[1].data_ptr()


def test_an_offloaded_master_has_a_gradient_from_the_start_and_loses_it_with_its_state() -> None:
    life = Life(host_gradient=torch.zeros_like)
    life.state.train([0, 1])
    masters = life.state.masters(range(5))
    assert [master.grad.shape for master in masters if master.grad is not None] == [(300,), (5,), (7,)]
    life.state.train([1])
    assert [master.grad is None for master in masters] == [True, True, False]


def test_ages_and_norms_are_forgotten_with_the_moments() -> None:
    life = Life()
    life.state.train(["embeddings", 0])
    for _ in range(2):
        life.limit.limit(["embeddings", 0], torch.tensor([1.0, 2.0], dtype=torch.float64))
        life.limit.stepped()
        life.step()
    assert life.state.care_state_dict() == {"ages": {"embeddings": 2, 0: 2}, "norms": {"embeddings": 1.0, 0: 2.0}}
    saved = life.state.care_state_dict()
    life.state.train(["embeddings", 1])
    assert life.state.care_state_dict() == {"ages": {"embeddings": 2, 1: 0}, "norms": {"embeddings": 1.0}}
    life.state.forget_moments()
    assert life.state.care_state_dict() == {"ages": {"embeddings": 0, 1: 0}, "norms": {}}
    assert life.steps_of("embeddings") == [0.0]
    life.state.train(["embeddings", 0])
    life.state.load_care_state_dict(saved, ["embeddings", 0], "cpu")
    assert life.state.care_state_dict() == saved


def test_codes_are_restored_as_they_are() -> None:
    """torch's own load_state_dict would cast them to the type of the weights."""
    life = Life(moments="int8")
    life.state.train([0, 1])
    life.step()
    masters = life.state.masters(range(5))
    tables = [life.state.moments_of(i, [SIZES[i]]) for i in (1, 2, 3)]
    codes = [{key: value.clone() for key, value in table.items()} for table in tables]
    saved = {"state": dict(enumerate(codes)), "param_groups": [{"params": [0, 1]}, {"params": [2]}]}
    life.state.forget_moments()
    life.state.restore(saved, masters)
    for i, table in zip((1, 2, 3), codes, strict=True):
        found = life.state.moments_of(i, [SIZES[i]])
        assert found.keys() == table.keys()
        for key, value in table.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)
            assert found[key].data_ptr() != value.data_ptr()  # the file's are not kept alive
