"""The tensors of an exported model have the names that they have in the files it was loaded from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lisa_ds.checkpoint import names
from tests.ranks import run_ranks
from tests.train.export_runs import ADAPTERS, CASES, adapters_exported, exported, write_input


@pytest.mark.multirank
def test_an_exported_model_has_the_names_of_its_input(tmp_path: Path) -> None:
    found = run_ranks(1, exported, tmp_path, str(tmp_path))[0]
    assert found.keys() == CASES.keys()
    for case, parts in found.items():
        assert parts["run"] == parts["input"], case
        assert parts["command"] == parts["input"], case
        assert not parts["changed"], case


@pytest.mark.parametrize(
    "case", ["gpt2 as published", "llama tied, both kept", "llama tied, the head kept", "opt as published"]
)
def test_names_are_restored_in_shards_too(case: str, tmp_path: Path) -> None:
    write_input(case, tmp_path / "input")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "input").eval()
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    names.restore(tmp_path / "out", names.stored_in(tmp_path / "input"), model)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shapes = {name: stored.shape for name, stored in names.stored_in(tmp_path / "input").items()}
    found = names.stored_in(tmp_path / "out")
    assert {name: stored.shape for name, stored in found.items()} == shapes
    assert index["weight_map"] == {name: stored.path.name for name, stored in found.items()}
    assert len(set(index["weight_map"].values())) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.multirank
def test_a_peft_checkpoint_is_exported_as_adapter_and_merged(tmp_path: Path) -> None:
    found = run_ranks(1, adapters_exported, tmp_path, str(tmp_path))[0]
    for name in ADAPTERS:
        adapter, merged, untrained = found[name]
        assert adapter < 1e-4, name
        assert merged < 1e-3, name  # added up in another order
        assert untrained > 1e-2, name
        assert found[f"names of {name}"], name
    assert found["no config"] == (
        f"{tmp_path}/lora/checkpoint: holds the weights of a PEFT model; there is no adapter_config.json in it or beside it: copy "
        "there the one that model.save_pretrained(directory) writes"
    )
    assert found["nothing to merge"] == (
        f"{tmp_path}/plain: there is no adapter_config.json in it or beside it, so there is nothing to merge"
    )
