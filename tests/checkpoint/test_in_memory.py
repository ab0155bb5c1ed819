"""Adapters merged for a while: a plain model inside, and the former bits afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lisa_ds.checkpoint import merged
from lisa_ds.errors import CheckpointError
from tests.checkpoint.adapter_cases import CASES, TIED, Case, build, greedy, load, logits
from tests.checkpoint.partitioned_runs import merged_under_zero3
from tests.ranks import run_ranks


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


@pytest.mark.parametrize("name", ["lora", "dora", "conv1d", "embeddings", "a head to save"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_the_former_ones_afterwards(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(CASES[name], tmp_path, dtype)
    before, expected = snapshot(model), logits(model)
    places = {key: weight.data_ptr() for key, weight in model.named_parameters() if "lora" not in key}
    with merged(model) as same:
        assert same is model
        layers = [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
        assert layers
        assert all(layer.merged for layer in layers)
        inside = logits(model)
    assert (inside - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * expected.abs().max()
    assert_same(model, before)
    assert torch.equal(logits(model), expected)
    assert not any(layer.merged for layer in layers)
    if name != "dora":  # of which PEFT replaces the weight
        assert places == {key: weight.data_ptr() for key, weight in model.named_parameters() if "lora" not in key}


def test_it_generates_as_the_model_does(tmp_path: Path) -> None:
    model = build(CASES["lora"], tmp_path)
    answer = greedy(model)
    with merged(model):
        assert greedy(model) == answer
    assert greedy(load(tmp_path / "base")) != answer  # the control


def test_weights_are_the_former_ones_after_an_error(tmp_path: Path) -> None:
    model = build(CASES["dora"], tmp_path)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="while it is merged"), merged(model):
        raise RuntimeError("while it is merged")
    assert_same(model, before)
    with merged(model):  # and again
        pass
    assert_same(model, before)


def test_weights_are_the_former_ones_if_merging_itself_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CASES["lora"], tmp_path)
    before = snapshot(model)
    last = model.base_model.model.model.layers[1].self_attn.v_proj

    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(last, "merge", fail)
    with pytest.raises(MemoryError), merged(model):
        pass
    assert_same(model, before)


def test_only_the_active_adapter_is_merged(tmp_path: Path) -> None:
    model = build(CASES["lora"], tmp_path)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    before = snapshot(model)
    expected = logits(model)
    with merged(model):
        assert (logits(model) - expected).abs().max() < 1e-4
    assert_same(model, before)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no adapter; give a PEFT model"):
        merged(load_plain(tmp_path)).__enter__()
    model = build(CASES["lora"], tmp_path / "twice")
    with (
        merged(model),
        pytest.raises(CheckpointError, match=r"q_proj is merged already; call model.unmerge_adapter\(\)"),
    ):
        merged(model).__enter__()
    tied = build(TIED["embeddings"], tmp_path / "tied")
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.base_layer.weight and .*lm_head.weight are one tied weight"
    ):
        merged(tied).__enter__()


@pytest.mark.multirank
def test_a_partitioned_model_is_refused(tmp_path: Path) -> None:
    found = run_ranks(1, merged_under_zero3, tmp_path, str(tmp_path))[0]
    assert found["said"] == (
        "merged(model): base_model.model.model.layers.0.self_attn.q_proj.weight is partitioned over ranks (ZeRO-3, FSDP or tensor "
        "parallelism), and can only be merged as a whole: export the adapter (lisa-ds export) and merge it in files (lisa-ds merge)"
    )
    assert not found["merged"]


def load_plain(root: Path) -> Any:
    build(Case(), root / "plain")
    return load(root / "plain/base")
