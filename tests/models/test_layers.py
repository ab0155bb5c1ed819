"""Every architecture that is fine-tuned in practice comes apart into the same four kinds of units."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lisa_ds.layers import LayerStack
from tests.models.layer_cases import TINY, Block, Case, Plain, assert_every_parameter_is_in_one_unit, blocks, names

GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
HEAD_DIM = {"head_dim": 8}


def classifier(config: str, blocks: str, embeddings: tuple[str, ...], lm_head: tuple[str, ...], **options: Any) -> Case:
    return Case(config, blocks, False, options, "AutoModelForSequenceClassification", embeddings, lm_head)


BERT = ("word_embeddings", "position_embeddings", "token_type_embeddings")
DENSE_HEAD = tuple(f"classifier.{part}" for part in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"))
CASES = [
    *(
        Case(f"{name}Config", "model.layers")
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Olmo", "Olmo2", "GptOss")
    ),
    *(Case(f"{name}Config", "model.layers", True, HEAD_DIM) for name in ("Gemma", "Gemma2", "Gemma3Text")),
    Case("LlamaConfig", "model.layers", True, {"tie_word_embeddings": True, "num_hidden_layers": 1}, lengths=(1,)),
    Case("PhiConfig", "model.layers", lm_head=("lm_head.weight", "lm_head.bias")),
    Case("GPT2Config", "transformer.h", True, GPT2, embeddings=("wte", "wpe")),
    Case("GPTNeoXConfig", "gpt_neox.layers", embeddings=("embed_in",)),
    Case(
        *("OPTConfig", "model.decoder.layers", True, {"ffn_dim": 24, "word_embed_proj_dim": 16}),
        embeddings=("embed_tokens", "embed_positions"),
    ),
    Case("BloomConfig", "transformer.h", True, {"n_layer": 3, "n_head": 2}, embeddings=("word_embeddings",)),
    Case("FalconConfig", "transformer.h", True, embeddings=("word_embeddings",)),
    Case("MixtralConfig", "model.layers", options={"num_local_experts": 4}),
    Case("Qwen2MoeConfig", "model.layers", options={**EXPERTS, "shared_expert_intermediate_size": 8}),
    Case("Qwen3MoeConfig", "model.layers", options=EXPERTS),
    Case(
        *("T5Config", "encoder.block,decoder.block", True, T5, "AutoModelForSeq2SeqLM"),
        **{"embeddings": ("shared",), "lengths": (3, 2)},
    ),
    Case(
        *("BertConfig", "bert.encoder.layer", True, None, "AutoModelForMaskedLM", BERT),
        lm_head=("cls.predictions.bias",),  # its weight is tied
    ),
    classifier("BertConfig", "bert.encoder.layer", BERT, ("classifier.weight", "classifier.bias")),
    classifier("RobertaConfig", "roberta.encoder.layer", BERT, DENSE_HEAD),
    classifier("LlamaConfig", "model.layers", ("embed_tokens",), ("score.weight",)),
    classifier("GPT2Config", "transformer.h", ("wte", "wpe"), ("score.weight",), **GPT2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_finds_blocks_embeddings_and_head(case: Case) -> None:
    model = case.build()
    stack = LayerStack.from_model(model)

    assert stack.paths == case.blocks.split(",")
    assert tuple(len(indices) for indices in stack.stacks) == case.lengths
    assert [index for indices in stack.stacks for index in indices] == list(range(len(stack.layers)))
    expected = [block for path in stack.paths for block in model.get_submodule(path)]
    assert all(block is other for block, other in zip(stack.layers, expected, strict=True))

    assert stack.tied is case.tied
    tied_weight = {"lm_head.weight"} if case.tied else set()
    assert sorted(names(stack, "lm_head")) == sorted({*case.lm_head} - tied_weight)
    assert {name.split(".")[-2] for name in names(stack, "embeddings")} == {*case.embeddings}
    assert all(re.search(r"norm|ln_f|pooler|transform\.dense", name.lower()) for name in names(stack, "rest"))
    assert_every_parameter_is_in_one_unit(model, stack)

    explicit = LayerStack.from_model(model, case.blocks)
    assert (explicit.unit_of, explicit.paths) == (stack.unit_of, stack.paths)


def test_a_vision_tower_does_not_pass_for_the_language_model() -> None:
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = transformers.Gemma3TextConfig(**TINY, **HEAD_DIM)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision)
    )
    stack = LayerStack.from_model(model)
    assert stack.paths == ["model.language_model.layers"]
    assert any("vision_tower.encoder.layers.0." in name for name in names(stack, "rest"))
    assert_every_parameter_is_in_one_unit(model, stack)


@pytest.mark.parametrize("layers_path", ["auto", "model.layers", "model.model.layers"])
def test_sees_through_peft(layers_path: str) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], r=2)
    model = peft.get_peft_model(Case("LlamaConfig", "model.layers").build(), lora)
    stack = LayerStack.from_model(model, layers_path)
    assert stack.paths == ["base_model.model.model.layers"]
    assert sum("lora_" in stack.names[id(p)] for p in stack.parameters(0)) == 4
    assert all(".lm_head." in name for name in names(stack, "lm_head"))
    assert len(stack.lm_head) == 2  # the original, and the one that PEFT trains
    assert_every_parameter_is_in_one_unit(model, stack)


PLAIN = {
    "list": Plain(embed=nn.Embedding(5, 4), blocks=blocks(), norm=nn.LayerNorm(4), head=nn.Linear(4, 5)),
    "sequential": Plain(embed=nn.Embedding(5, 4), blocks=nn.Sequential(*blocks()), head=nn.Linear(4, 5)),
    "dict": Plain(embed=nn.Embedding(5, 4), blocks=nn.ModuleDict({str(i): Block() for i in range(3)})),
    "experts": Plain(blocks=blocks(experts=64), neck=nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))),
    "small rivals": Plain(blocks=blocks(width=16), adapters=nn.ModuleList(nn.Linear(4, 4) for _ in range(3))),
    "embeddings in a list": Plain(codebooks=nn.ModuleList(nn.Embedding(99, 9) for _ in range(9)), blocks=blocks()),
}


@pytest.mark.parametrize("model", PLAIN.values(), ids=PLAIN)
def test_finds_the_blocks_of_a_plain_module(model: Plain) -> None:
    stack = LayerStack.from_model(model)
    assert (stack.paths, stack.stacks, stack.tied) == (["blocks"], [range(3)], False)
    assert all(isinstance(block, Block) for block in stack.layers)
    assert all(name.startswith("head.") for name in names(stack, "lm_head"))
    assert all(name.startswith(("embed.", "codebooks.")) for name in names(stack, "embeddings"))
    assert_every_parameter_is_in_one_unit(model, stack)


def test_a_small_list_beside_the_word_embeddings_is_not_the_stack() -> None:
    model = Plain(text=Plain(words=nn.Embedding(5, 4), filters=blocks(1)), blocks=blocks(width=16))
    model.get_input_embeddings = lambda: model.text.words
    assert LayerStack.from_model(model).paths == ["blocks"]


def test_only_the_outermost_head_is_the_head() -> None:
    tower = Plain(norm=nn.LayerNorm(4), head=nn.Linear(4, 4))
    model = Plain(lm_head=Plain(blocks=blocks(), final=nn.Linear(4, 4)), tower=tower, head=nn.Linear(4, 5))
    stack = LayerStack.from_model(model)
    assert names(stack, "lm_head") == ["head.weight", "head.bias"]  # not what is called one, but holds the blocks
    assert_every_parameter_is_in_one_unit(model, stack)


@pytest.mark.parametrize("layers_path", ["auto", "."])
def test_finds_the_run_of_blocks_in_a_sequence(layers_path: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Dropout(), *blocks(), nn.LayerNorm(4), nn.Linear(4, 5))
    stack = LayerStack.from_model(model, layers_path)
    assert stack.layers == list(model[2:5])
    assert (stack.paths, names(stack, "embeddings")) == (["."], ["0.weight"])
    assert_every_parameter_is_in_one_unit(model, stack)


def test_an_encoder_and_its_decoder_are_one_list_of_blocks() -> None:
    model = nn.Transformer(8, 2, num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=8, batch_first=True)
    stack = LayerStack.from_model(model)
    assert stack.paths == ["encoder.layers", "decoder.layers"]
    assert stack.stacks == [range(0, 2), range(2, 5)]
    assert LayerStack.from_model(model, "decoder.layers, encoder.layers").stacks == [range(0, 3), range(3, 5)]
    assert LayerStack.from_model(model, "decoder.layers").stacks == [range(3)]


def test_a_tied_weight_is_counted_once_and_its_bias_stays_with_the_head() -> None:
    model = Plain(embed=nn.Embedding(5, 4), blocks=blocks(), to_words=nn.Linear(4, 5))
    assert not LayerStack.from_model(model).tied
    model.to_words.weight = model.embed.weight
    stack = LayerStack.from_model(model)
    assert stack.tied
    assert names(stack, "embeddings") == ["embed.weight"]
    assert names(stack, "lm_head") == ["to_words.bias"]
    assert_every_parameter_is_in_one_unit(model, stack)


def test_a_module_with_two_names_is_not_a_shared_one() -> None:
    model = Plain(blocks=blocks())
    model.alias = model.blocks
    assert LayerStack.from_model(model).paths == ["blocks"]
    assert LayerStack.from_model(model, "alias").stacks == [range(3)]


def test_sizes_are_whole_where_zero3_has_partitioned_the_parameters() -> None:
    model = Plain(embed=nn.Embedding(5, 4), adapters=blocks(1), blocks=blocks())
    whole = LayerStack.from_model(model).numels()
    for parameter in model.parameters():  # what deepspeed.zero.Init leaves on a rank
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    stack = LayerStack.from_model(model)
    assert stack.paths == ["blocks"]
    assert stack.numels() == whole
    assert whole["embeddings"] == (20,)
    assert whole[0] == (16, 4)


@pytest.mark.parametrize("layers_path", ["layers", "model.layers", "model.model.layers", "module.model.layers"])
@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
def test_a_path_may_start_where_peers_start_it(layers_path: str, bare: bool) -> None:
    model = Case("LlamaConfig", "model.layers").build()
    stack = LayerStack.from_model(model.model if bare else model, layers_path)
    assert stack.paths == ["layers" if bare else "model.layers"]


def test_says_what_it_found_in_one_line() -> None:
    assert repr(LayerStack.from_model(PLAIN["list"])) == "LayerStack(blocks (3); untied)"
