"""Merging an adapter into its base in files: exact, for every kind, and refused in words where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lisa_ds.checkpoint import export, merge, merging, unmerge
from lisa_ds.cli import main
from lisa_ds.errors import CheckpointError, ModelError
from lisa_ds.models import stored
from tests import tiny
from tests.checkpoint.adapter_cases import CASES, TIED, Case, build, greedy, load, logits, tensors


@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_is_pefts_in_fp32(name: str, tmp_path: Path) -> None:
    model = build(CASES[name], tmp_path)
    expected = logits(model)
    changed = merge(tmp_path / "adapter", tmp_path / "out")
    found, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    assert found.keys() == base.keys()
    assert sum(not torch.equal(found[key], base[key]) for key in base) == changed > 0
    untrained = logits(load(tmp_path / "base"))
    merged = load(tmp_path / "out")
    assert (logits(merged) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (untrained - expected).abs().max() > 1e-2 * expected.abs().max()  # the control: the adapter matters
    unloaded = model.merge_and_unload()
    ours = dict(merged.named_parameters())
    for key, weight in unloaded.named_parameters():
        assert torch.equal(ours[key], weight), key


@pytest.mark.parametrize("name", TIED)
def test_a_tied_weight_that_changes_is_parted_from_the_other(name: str, tmp_path: Path) -> None:
    model = build(TIED[name], tmp_path)
    expected, answer = logits(model), greedy(model)
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (logits(merged) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert greedy(merged) == answer
    head, embeddings = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert (head - embeddings).abs().max() > 1e-2  # the control: tied, they could not both be right


@pytest.mark.parametrize("name", ["embeddings", "head", "head to save"])
def test_an_export_does_not_merge_in_place_what_is_tied(name: str, tmp_path: Path) -> None:
    model = build(TIED[name], tmp_path)
    expected = logits(model)
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(tmp_path / "adapter/adapter_config.json", tmp_path / "checkpoint")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path / "checkpoint", tmp_path / "out", lambda *_: weights, merged=True)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoint: its adapter changes one of lm_head.weight and model.embed_tokens.weight, which are one tied weight, and "
        "merging would change both; export without --merged, then merge in files, which parts them: lisa-ds merge"
    )
    export(tmp_path / "checkpoint", tmp_path / "alone", lambda *_: weights)
    merge(tmp_path / "alone", tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - expected).abs().max() < 1e-4


def test_tied_weights_that_do_not_change_stay_tied(tmp_path: Path) -> None:
    build(Case(shape={"tie_word_embeddings": True}), tmp_path)
    merge(tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "adapter", "safe"), [("lora", "bfloat16", False), ("lora", "float32", True), ("dora", "bfloat16", False)]
)
def test_bf16_is_rounded_once(kind: str, adapter: str, safe: bool, tmp_path: Path) -> None:
    """PEFT rounds the difference and then the sum, if the adapter is in bf16 or the merge is a safe one."""
    build(CASES[kind], tmp_path, torch.bfloat16)
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: tensor.to(getattr(torch, adapter)) for key, tensor in load_file(file).items()}, file)
    merge(tmp_path / "adapter", tmp_path / "out")
    shutil.copytree(tmp_path / "base", tmp_path / "wide")
    base = {key: tensor.float() for key, tensor in tensors(tmp_path / "base").items()}
    save_file(base, tmp_path / "wide/model.safetensors", {"format": "pt"})
    merge(tmp_path / "adapter", tmp_path / "exact", base=str(tmp_path / "wide"))
    ours, exact = tensors(tmp_path / "out"), tensors(tmp_path / "exact")
    model = peft.PeftModel.from_pretrained(
        load(tmp_path / "base"), tmp_path / "adapter", autocast_adapter_dtype=adapter == "float32"
    )
    pefts = dict(model.merge_and_unload(safe_merge=safe).named_parameters())
    errors = {"ours": 0.0, "peft's": 0.0}
    for key in json.loads((tmp_path / "out" / merging.RECORD).read_text())["changed"]:
        assert ours[key].dtype == torch.bfloat16
        assert torch.equal(ours[key], exact[key].bfloat16())
        for whose, found in {"ours": ours[key], "peft's": pefts[key].detach()}.items():
            errors[whose] += float((found.double() - exact[key].double()).square().sum())
    assert errors["peft's"] > 1.05 * errors["ours"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_are_written_in_the_dtype_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    build(CASES["conv1d as published"], tmp_path)
    merge(tmp_path / "adapter", tmp_path / "same")
    merge(tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    chosen = getattr(torch, dtype)
    same, found = tensors(tmp_path / "same"), tensors(tmp_path / "out")
    assert all(torch.equal(found[key], tensor.to(chosen)) for key, tensor in same.items())
    assert load(tmp_path / "out").dtype == chosen


def test_a_dtype_that_is_too_small_is_refused(tmp_path: Path) -> None:
    build(CASES["lora"], tmp_path)
    found = load_file(tmp_path / "base/model.safetensors")
    found["model.norm.weight"][3] = 1e6
    save_file(found, tmp_path / "base/model.safetensors", {"format": "pt"})
    message = "model.norm.weight: has values that float16 has not; choose another --dtype"
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "adapter", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")


def test_one_weight_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(CASES["shards"], tmp_path)
    alive, most = 0, 0
    compute = stored.ComputedTensor.chunks

    def counted(self: stored.ComputedTensor) -> Any:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        yield from compute(self)
        alive -= 1

    monkeypatch.setattr(stored.ComputedTensor, "chunks", counted)
    changed = merge(tmp_path / "adapter", tmp_path / "out")
    assert (changed, most, alive) == (4, 1, 0)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index == json.loads((tmp_path / "base/model.safetensors.index.json").read_text()) | {
        "metadata": {"total_size": index["metadata"]["total_size"]}
    }
    assert len(set(index["weight_map"].values())) > 1


def test_a_reloaded_adapter_answers_as_the_one_that_was_saved(tmp_path: Path) -> None:
    model = build(CASES["dora"], tmp_path)
    expected, answer = logits(model), greedy(model)
    reloaded = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits(reloaded), expected)
    assert greedy(reloaded) == answer
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = load(tmp_path / "out")
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert greedy(merged) == answer
    assert greedy(load(tmp_path / "base")) != answer  # the control


def test_the_directory_says_what_was_merged_and_has_a_tokenizer(tmp_path: Path) -> None:
    build(CASES["lora"], tmp_path)
    command = ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    record = json.loads((tmp_path / "out" / merging.RECORD).read_text())
    assert record["base"]["name_or_path"] == str((tmp_path / "base").resolve())
    assert len(record["base"]["tensors_sha256"]) == len(record["adapter"]["sha256"]) == 64
    assert record["dtype"] == "as in the base"
    assert {"peft", "torch", "transformers", "lisa_ds"} <= record["versions"].keys()
    own = tiny.tokenizer()
    own.chat_template = "of the adapter"
    assert (tmp_path / "out/tokenizer.json").read_text() == (tmp_path / "base/tokenizer.json").read_text()
    own.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "again")
    assert (tmp_path / "again/chat_template.jinja").read_text() == "of the adapter"


def _edit(key: str, value: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        file = root / "adapter/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return edit


def _cut(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-100])


def _without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def _other_base(root: Path) -> None:
    build(Case(shape={"hidden_size": 64}), root / "other")
    _edit("base_model_name_or_path", str(root / "other/base"))(root)


def _huge(root: Path) -> None:
    file = root / "adapter/adapter_model.safetensors"
    save_file({key: tensor * 1e30 for key, tensor in load_file(file).items()}, file)


def _drop(root: Path) -> None:
    file = root / "adapter/adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layers.1" not in key}, file)


def _rename(root: Path) -> None:
    file = root / "adapter/adapter_model.safetensors"
    save_file(
        {key.replace("layers.1", "layers.7"): tensor for key, tensor in load_file(file).items()} | load_file(file), file
    )


CANNOT = "and such an adapter cannot be merged in files"
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        _without("adapter/adapter_config.json"),
        "{adapter}: holds no adapter_config.json, so it is no adapter as PEFT saves it",
    ),
    "damaged config": (
        lambda root: (root / "adapter/adapter_config.json").write_text("{"),
        "{adapter}/adapter_config.json: is damaged; copy it again",
    ),
    "no weights": (_without("adapter/adapter_model.safetensors"), "{adapter}: holds no adapter_model.safetensors"),
    "cut adapter": (_cut("adapter/adapter_model.safetensors"), "{adapter}/adapter_model.safetensors: is truncated: "),
    "cut base": (_cut("base/model.safetensors"), "{base}/model.safetensors: is truncated: "),
    "no base": (
        _edit("base_model_name_or_path", "/nowhere/base"),
        "/nowhere/base: no such directory (looked from {cwd}) ({adapter} names it as its base; say where it is: --base MODEL)",
    ),
    "no base is named": (
        _edit("base_model_name_or_path", None),
        "{adapter}: its adapter_config.json names no base model; name it: --base MODEL",
    ),
    "base of another shape": (
        _other_base,
        "{adapter}/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape [4, 32], but "
        "for this base model it would have [4, 64]; is it the base model that the adapter was trained on?",
    ),
    "too large": (_huge, "model.layers.0.self_attn.q_proj"),
    "part of it is missing": (
        _drop,
        "{adapter}/adapter_model.safetensors: lacks base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight, ",
    ),
    "too much": (
        _rename,
        "{adapter}/adapter_model.safetensors: the base model has no place for base_model.model.model.layers.7.self_attn.",
    ),
    "another kind": (
        _edit("peft_type", "IA3"),
        "{adapter}/adapter_config.json: peft_type is IA3; only LORA, with DoRA and rsLoRA, can be merged in files",
    ),
    "pissa": (
        _edit("init_lora_weights", "pissa"),
        "{adapter}/adapter_config.json: init_lora_weights is 'pissa', which changed the base's weights before the training; ",
    ),
    "layers replicated": (
        _edit("layer_replication", [[0, 1]]),
        "{adapter}/adapter_config.json: layer_replication is [[0, 1]], " + CANNOT,
    ),
    "of a later PEFT": (
        _edit("use_something_new", True),
        "{adapter}/adapter_config.json: use_something_new is true, " + CANNOT,
    ),
    "quantised base": (
        lambda root: (root / "base/config.json").write_text(
            json.dumps(json.loads((root / "base/config.json").read_text()) | {"quantization_config": {"bits": 4}})
        ),
        "{base}: its weights are quantised, and an adapter cannot be added to them; name the model it was made from",
    ),
    "taken": (lambda root: (root / "out/x").mkdir(parents=True), "{out}: exists already; choose a new directory"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_merged_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSALS[name]
    build(CASES["lora"], tmp_path)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 2
    places = {key: str(tmp_path / key) for key in ("adapter", "base", "out")}
    error = capsys.readouterr().err
    for key, place in places.items():
        message = message.replace(f"{{{key}}}", place)
    assert error.startswith(f"lisa-ds: error: {message.replace('{cwd}', str(Path.cwd()))}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_experts_that_are_joined_while_they_are_loaded_are_refused(tmp_path: Path) -> None:
    build(Case("mixtral", {"modules_to_save": ["mlp"]}), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor of its own for .*mlp\.experts"):
        merge(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("case", ["lora", "shards"])
def test_a_base_on_the_hub_is_found_in_its_cache(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(CASES[case], tmp_path)
    commit = "0123456789" * 4
    place = tmp_path / "hub/models--someone--base"
    shutil.copytree(tmp_path / "base", place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    merge(tmp_path / "adapter", tmp_path / "out", base="someone/base")
    merge(tmp_path / "adapter", tmp_path / "expected")
    expected = tensors(tmp_path / "expected")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors(tmp_path / "out").items())
    record = json.loads((tmp_path / "out" / merging.RECORD).read_text())["base"]
    assert (record["name_or_path"], record["revision"]) == ("someone/base", commit)
    unmerge(tmp_path / "out", tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "base").keys()
    with pytest.raises(ModelError, match=r"nobody/base: there is no such directory .*, and the hub does not give it"):
        merge(tmp_path / "adapter", tmp_path / "none", base="nobody/base")
