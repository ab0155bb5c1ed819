"""Models whose layers cannot be sampled are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

from lisa_ds.errors import ModelError
from lisa_ds.layers import LayerStack
from tests.models.layer_cases import TINY, Block, Case, Plain, blocks


def shared_with_a_block() -> Plain:
    model = Plain(blocks=blocks(), head=nn.Linear(4, 4))
    model.head.weight = model.blocks[1].linear.weight
    return model


def bert_to_bert() -> nn.Module:
    encoder, decoder = (transformers.BertConfig(**TINY, is_decoder=i, add_cross_attention=i) for i in (False, True))
    return transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    )


def run_three_times() -> nn.Module:
    options = {"embedding_size": 8}
    return Case("AlbertConfig", "", options=options, auto="AutoModelForSequenceClassification").build()


REFUSED = {
    "none": (lambda: nn.Linear(2, 2), "auto", r"^Linear has no stack of blocks: .* wrap the blocks"),
    "only embeddings": (
        *(lambda: Plain(words=nn.ModuleList(nn.Embedding(5, 4) for _ in range(3))), "auto"),
        "^Plain has no stack of blocks",
    ),
    "two alike": (
        *(lambda: Plain(left=blocks(), right=blocks()), "auto"),
        r"^more than one stack .* meant: left \(3 x Block\), right \(3 x Block\); set layers_path .* 'left,right'$",
    ),
    "two nearly alike": (
        *(lambda: Plain(left=blocks(3), right=blocks(4)), "auto"),
        r"^more than one stack of blocks could be meant: right \(4 x Block\), left \(3 x Block\)",
    ),
    "two models in one": (
        *(bert_to_bert, "auto"),
        r"more than one stack .* meant: decoder.bert.encoder.layer \(3 x BertLayer\), encoder.encoder.layer \(3 x",
    ),
    "a block repeated": (
        *(lambda: Plain(blocks=nn.ModuleList([Block()] * 3)), "auto"),
        "^blocks.0.linear.weight is shared by blocks 0 and 1: one cannot train while the other is frozen",
    ),
    "shared outside": (
        *(shared_with_a_block, "auto"),
        r"^blocks.1.linear.weight is shared by block 1 and head \(weight\)",
    ),
    "a block run several times": (
        *(run_three_times, "auto"),
        r"^albert.encoder.albert_layer_groups \(1 x AlbertLayerGroup\) is one block that the model runs 3 times",
    ),
    "misspelt": (
        *(lambda: Plain(layers=blocks(), mtp=blocks(1)), "layer"),
        r"^layers_path: 'layer' leads nowhere in Plain; did you mean 'layers'\?; "
        r"its stacks of blocks: layers \(3 x Block\), mtp \(1 x Block\)$",
    ),
    "one of its blocks": (
        *(lambda: Plain(layers=blocks()), "layers.0"),
        r"^layers_path: 'layers.0' leads to Block, which is no list of blocks in Plain; did you mean 'layers'\?",
    ),
    "above it": (
        *(lambda: Plain(model=Plain(layers=blocks())), "model"),
        r"^layers_path: 'model' leads to Plain, .* did you mean 'model.layers'\?",
    ),
    "two fit": (
        *(lambda: Plain(encoder=Plain(block=blocks()), decoder=Plain(block=blocks())), "block"),
        r"^layers_path: 'block' fits encoder.block and decoder.block in Plain",
    ),
    "twice": (
        *(lambda: Plain(layers=blocks()), "layers,model.layers"),
        r"^layers_path: 'layers,model.layers' names layers twice$",
    ),
    "an empty part": (
        lambda: Plain(layers=blocks()),
        "layers,",
        r"^layers_path: '' leads nowhere in Plain; its stacks",
    ),
}


@pytest.mark.parametrize(("build", "layers_path", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_cannot_be_sampled(build: Any, layers_path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LayerStack.from_model(build(), layers_path)


def test_a_block_that_runs_several_times_can_be_asked_for() -> None:
    assert len(LayerStack.from_model(run_three_times(), "albert_layer_groups").layers) == 1
