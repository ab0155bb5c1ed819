"""A checkpoint streams into partitions: bit-equal to from_pretrained, never whole on a rank, refused where it does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.initialization import no_init_weights

from lisa_ds.errors import ModelError
from lisa_ds.models.stored import StoredTensor, stored_tensors
from tests import tiny
from tests.ranks import run_ranks
from tests.zero3.streaming_runs import load_all, peaks, refusals

# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_every_slice_is_what_safetensors_reads(
    tmp_path: Path, dtype: torch.dtype, target: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lisa_ds.models.stored.CHUNK_BYTES", 24)
    torch.manual_seed(0)
    tensors = {
        "a": (100 * torch.randn(7, 5)).to(dtype),
        "b": torch.randn(3).to(dtype),
        "empty": torch.zeros(0).to(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = stored_tensors(tmp_path / "x.safetensors")
    assert {name: (entry.shape, entry.dtype) for name, entry in stored.items()} == {
        name: (tuple(tensor.shape), dtype) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        for start in range(tensor.numel()):
            for end in (start, start + 1, tensor.numel()):
                read = torch.full((end - start,), -1).to(target)
                stored[name].read_into(read, start)
                assert torch.equal(read, tensor.flatten()[start:end].to(target))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    stored = stored_tensors(path)["a"]
    path.write_bytes(whole[:-1])
    with pytest.raises(
        ModelError, match=re.escape(f"{path}: is truncated: {len(whole) - 1} bytes of {len(whole)}; copy")
    ):
        stored_tensors(path)
    with pytest.raises(ModelError, match="ends within a; it was replaced or cut while it was read"):
        stored.read_into(torch.empty(100))
    path.write_bytes(whole[:20])
    with pytest.raises(ModelError, match=r"is truncated or no safetensors file \(20 bytes\)"):
        stored_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match=r"is truncated or no safetensors file \(0 bytes\)"):
        stored_tensors(path)
    path.write_bytes(whole[:8] + b"[" + whole[9:])
    with pytest.raises(ModelError, match="its header is damaged; copy or download it again"):
        stored_tensors(path)
    path.write_bytes(whole.replace(b"[100]", b"[101]"))
    with pytest.raises(ModelError, match="its header is damaged at a; copy"):
        stored_tensors(path)
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ModelError, match="a is stored as F8_E4M3, in which no weight is trained; convert it first"):
        stored_tensors(path)


# --- into partitions ----------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> dict[str, str]:
    """Checkpoints of every kind, and the task each is loaded for."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 28,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    llama = LlamaConfig(vocab_size=101, num_key_value_heads=1, attention_bias=True, pad_token_id=0, **sizes)
    LlamaForCausalLM(llama).to(torch.bfloat16).save_pretrained(folder / "plain", max_shard_size="12KB")
    assert len(list((folder / "plain").glob("*.safetensors"))) >= 3
    LlamaForCausalLM(llama).save_pretrained(folder / "fp32, one file")
    llama.tie_word_embeddings = True
    LlamaForCausalLM(llama).to(torch.bfloat16).save_pretrained(folder / "tied", max_shard_size="12KB")
    llama.tie_word_embeddings = False
    LlamaForCausalLM(llama).to(torch.bfloat16).save_pretrained(folder / "new head")
    gpt2 = GPT2Config(vocab_size=101, n_positions=32, n_embd=26, n_layer=2, n_head=2)
    GPT2LMHeadModel(gpt2).transformer.save_pretrained(folder / "no prefix")
    write_config(folder / "no prefix", architectures=["GPT2LMHeadModel"])
    bert = BertConfig(vocab_size=101, max_position_embeddings=32, num_labels=3, **sizes)
    BertForSequenceClassification(bert).save_pretrained(folder / "renamed")
    file = folder / "renamed/model.safetensors"
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    mixtral = MixtralConfig(vocab_size=101, num_key_value_heads=1, num_local_experts=2, **sizes)
    MixtralForCausalLM(mixtral).save_pretrained(folder / "merged")
    LlamaForCausalLM(llama).save_pretrained(folder / "pickled")
    torch.save(load_file(folder / "pickled/model.safetensors"), folder / "pickled/pytorch_model.bin")
    (folder / "pickled/model.safetensors").unlink()
    tasks = dict.fromkeys((path.name for path in folder.iterdir() if path.is_dir()), "causal_lm")
    return tasks | {"new head": "sequence_classification", "renamed": "sequence_classification"}


def write_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("streaming")
    tasks = write_models(folder)
    return run_ranks(3, load_all, tmp_path_factory.mktemp("ranks"), folder, tasks)


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["plain", "fp32, one file", "tied", "no prefix", "renamed"])
def test_weights_are_bit_equal_to_from_pretrained(loaded: list[dict[str, Any]], name: str) -> None:
    for rank in loaded:
        assert rank[name] == {"differ": [], "said": []}


@pytest.mark.multirank
def test_a_new_head_is_drawn_and_what_has_no_place_is_named(loaded: list[dict[str, Any]]) -> None:
    for rank in loaded:
        assert rank["new head"]["differ"] == ["score.weight"]
    assert loaded[0]["new head"]["said"] == ["the model has no place for lm_head.weight of its checkpoint"]


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("merged", "the weights of MixtralForCausalLM are merged or split while they are loaded"),
        ("pickled", "the checkpoint is not in safetensors files"),
    ],
)
def test_what_cannot_be_streamed_is_loaded_by_transformers_with_a_notice(
    loaded: list[dict[str, Any]], name: str, reason: str
) -> None:
    assert all(rank[name]["differ"] == [] for rank in loaded)
    assert loaded[0][name]["said"] == [
        f"the checkpoint is read by transformers' loader, by rank 0 as a whole: {reason}"
    ]
    assert loaded[1][name]["said"] == []


@pytest.mark.multirank
def test_ranks_that_all_read_the_first_slice_are_seen(loaded: list[dict[str, Any]]) -> None:
    assert len(loaded[1]["control"]["differ"]) > 20


@pytest.mark.multirank
def test_every_rank_refuses_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("lacking", "misshapen", "misnamed", "truncated")]
    for folder in folders:
        tiny.write_model(folder, num_hidden_layers=2)
    files = [folder / "model.safetensors" for folder in folders]
    weights = load_file(files[0])
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != key}, files[0], metadata={"format": "pt"})
    write_config(folders[1], intermediate_size=48)
    save_file({f"net.{name}": tensor for name, tensor in weights.items()}, files[2], metadata={"format": "pt"})
    files[3].write_bytes(files[3].read_bytes()[:-10])
    size = files[3].stat().st_size
    expected = [
        f"{folders[0]}: no file of it has {key}; is a shard missing, or config.json another's?",
        "\n".join(
            f"{files[1]}: model.layers.{layer}.mlp.{name}.weight has shape {shape}, but by config.json it has {wanted}"
            for layer in (0, 1)
            for name, shape, wanted in (
                ("gate_proj", [64, 32], [48, 32]),
                ("up_proj", [64, 32], [48, 32]),
                ("down_proj", [32, 64], [32, 48]),
            )
        ),
        f"{folders[2]}: no file of it has lm_head.weight, model.embed_tokens.weight",
        f"{files[3]}: is truncated: {size} bytes of {size + 10}; copy or download it again",
    ]
    for told in run_ranks(2, refusals, tmp_path, folders):
        assert told[0] == expected[0]
        first_five = expected[1].splitlines()[:5]
        assert told[1].splitlines() == [*first_five, "... and 1 more such tensors"]
        assert told[2].startswith(f"{folders[2]}: no file of it has model.embed_tokens.weight, model.layers.0.")
        assert told[2].splitlines()[1].startswith("the model has no place for net.")
        assert told[3] == expected[3]


# --- memory -------------------------------------------------------------------------------------------------------------

SLACK = 160 * 2**20  # of allocators: what is freed in small pieces is not all given back; up to 130 MB were seen


def write_large_model(folder: Path, layers: int) -> int:
    """A bf16 checkpoint with random weights in shards of at most 50 MB; how many there are."""
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        dtype="bfloat16",
    )
    with no_init_weights():
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.save_pretrained(folder, max_shard_size="50MB")
    return len(list(folder.glob("*.safetensors")))


@pytest.mark.multirank
def test_no_rank_ever_holds_the_model(tmp_path: Path) -> None:
    assert write_large_model(tmp_path / "model", layers=12) >= 8
    small = tiny.write_model(tmp_path / "small")
    for rank, seen in enumerate(run_ranks(2, peaks, tmp_path, tmp_path / "model", small)):
        ours, stock = seen["streamed"], seen["stock"]
        bound = ours["partitions"] + ours["largest"] + SLACK
        assert ours["peak"] <= bound < ours["whole"], (rank, seen)
        assert rank or stock["peak"] > ours["whole"] > bound, (rank, seen)  # control: rank 0 maps every file


def test_a_stored_tensor_says_how_large_it_is() -> None:
    assert StoredTensor(Path("x"), "a", torch.float32, (3, 4), 8).numel == 12
