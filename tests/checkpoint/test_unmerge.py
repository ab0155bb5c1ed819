"""The base of a merged model comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lisa_ds.checkpoint import merge, merging, unmerge
from lisa_ds.cli import main
from lisa_ds.models import stored
from tests.checkpoint.adapter_cases import CASES, TIED, Case, build, load, logits, tensors
from tests.train.builtin import smollm2


@pytest.mark.parametrize("case", [CASES["shards"], TIED["embeddings to save, gpt2"]], ids=["shards", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_comes_back_bit_for_bit(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    build(case, tmp_path, dtype)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert main(["unmerge", str(tmp_path / "merged"), "--out", str(tmp_path / "out")]) == 0
    for file in (tmp_path / "base").glob("model*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "base")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subtracting_would_not_give_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """The control: why the base is read again."""
    model = build(CASES["lora"], tmp_path, dtype)
    base = tensors(tmp_path / "base")
    model.merge_adapter()
    model.unmerge_adapter()
    differ = [
        not torch.equal(weight, base[name.replace("base_model.model.", "").replace(".base_layer", "")])
        for name, weight in model.named_parameters()
        if name.endswith("base_layer.weight")
    ]
    assert len(differ) == 4
    assert all(differ)


def test_a_base_that_was_moved_or_split_otherwise_is_known_again(tmp_path: Path) -> None:
    build(CASES["shards"], tmp_path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    load(tmp_path / "base").save_pretrained(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "base")
    command = ["unmerge", str(tmp_path / "merged"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert main([*command, "--base", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "elsewhere/model.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["a bit", "a name", "a dtype", "a shape"])
def test_a_base_that_is_another_one_now_is_refused(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(CASES["lora"], tmp_path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    found = load_file(tmp_path / "base/model.safetensors")
    norm = found.pop("model.norm.weight")
    if change == "a bit":
        norm.view(torch.int32)[5] ^= 1
    changed = {"a dtype": norm.double(), "a shape": norm[None]}.get(change, norm)
    found["model.norms.weight" if change == "a name" else "model.norm.weight"] = changed
    save_file(found, tmp_path / "base/model.safetensors")
    capsys.readouterr()
    assert main(["unmerge", str(tmp_path / "merged"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"lisa-ds: error: {tmp_path}/base: its weights are not those that {tmp_path}/merged was merged from (their SHA-256 differs); "
        "name a copy of these: --base MODEL\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_digest_is_of_tensors_whatever_file_they_are_in(tmp_path: Path) -> None:
    parts = {name: torch.arange(size).float() for name, size in (("b", 5), ("a", 3), ("c", 2))}
    save_file(parts, tmp_path / "one")
    whole = stored.digest(stored.stored_tensors(tmp_path / "one"))
    for name, tensor in parts.items():
        save_file({name: tensor}, tmp_path / name)
    split = {name: tensor for name in parts for name, tensor in stored.stored_tensors(tmp_path / name).items()}
    assert stored.digest(split) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{merged}: holds no lisa_ds_merge.json, so it was not written by lisa-ds merge"),
        ("{", "{merged}/lisa_ds_merge.json: is damaged; it does not say what was merged"),
        ('{"base": 3}', "{merged}/lisa_ds_merge.json: is damaged; it does not say what was merged"),
    ],
)
def test_a_model_that_was_not_merged_here_is_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "merged").mkdir()
    if content is not None:
        (tmp_path / "merged" / merging.RECORD).write_text(content)
    assert main(["unmerge", str(tmp_path / "merged"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"lisa-ds: error: {message.format(merged=tmp_path / 'merged')}\n"


@pytest.mark.more
def test_the_built_in_model_is_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.checkpoint.adapter_cases import adapt
    from tests.train import builtin

    directory = smollm2()
    monkeypatch.setenv("LISA_DS_CACHE", str(builtin.CACHE))
    model = adapt(load(Path(directory)), {"r": 8}, tmp_path / "adapter", base="builtin:smollm2-135m")
    expected = logits(model.double())  # in fp32 this model multiplies the rounding of each machine's kernels
    merge(tmp_path / "adapter", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / merging.RECORD).read_text())
    assert record["base"]["name_or_path"] == "builtin:smollm2-135m"
    assert (logits(load(tmp_path / "merged").double()) - expected).abs().max() < 1e-4 * expected.abs().max()
    unmerge(tmp_path / "merged", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (Path(directory) / "model.safetensors").read_bytes()
