"""Logits at labelled positions alone: the loss and the gradients of the stock trainer, for less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    CTRLConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    XLNetConfig,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lisa_ds.integrations.label_logits import labelled_positions
from lisa_ds.integrations.trainer import LabelLogitsTrainer
from tests.ranks import run_ranks

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "softcapping": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    "mixture": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2),
    "mixture with a loss of its own": MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=2, output_router_logits=True
    ),
    "a forward that counts no items": CTRLConfig(
        vocab_size=97, n_embd=32, dff=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0
    ),
    # Their own losses are of labels that are not shifted.
    "own: xlnet": XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0),
    "own: decoder of bart": BartConfig(
        vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, dropout=0
    ),
}


def rows() -> list[dict[str, Tensor]]:
    """Prompts of different lengths without labels; two rows with none at all, a micro-batch of them."""
    made = []
    for i, tokens in enumerate(torch.randint(0, 97, (12, 16), generator=torch.Generator().manual_seed(0))):
        labels = tokens.clone()
        labels[: 16 if i in (2, 3) else 5 + i % 7] = -100
        made.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)})
    return made


def trained(kind: type[Trainer], shape: PreTrainedConfig, folder: str, accumulation: int, **changes: Any) -> Trainer:
    unset_hf_deepspeed_config()  # of the trainer before: under it a model is drawn in another order
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").float()
    settings = {"output_dir": folder, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_grad_norm": 1e9}
    settings |= {"max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
    settings |= {
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    args = TrainingArguments(**settings | changes)
    trainer = kind(model, args, train_dataset=rows(), eval_dataset=rows()[4:])
    trainer.train()
    trainer.evaluate()
    return trainer


def own_losses(shape: PreTrainedConfig, starts: list[int]) -> list[float]:
    """Of the untrained model, by its own forward, on batches of two rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").float().train()
    batches = [rows()[start : start + 2] for start in starts]
    return [
        float(model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss) for batch in batches
    ]


def losses(trainer: Trainer) -> list[float]:
    return [
        entry[key] for entry in trainer.state.log_history for key in ("loss", "grad_norm", "eval_loss") if key in entry
    ]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_the_stock_trainer_does(name: str, accumulation: int, tmp_path: Path) -> None:
    steps = 1 if accumulation == 1 else 2  # with one micro-batch a step, the second would have no label: 0/0 in both
    stock, ours = (
        trained(kind, MODELS[name], str(tmp_path), accumulation, max_steps=steps)
        for kind in (Trainer, LabelLogitsTrainer)
    )
    assert ours.labelled_only is ("own" not in name)
    expected = losses(stock)
    if name.startswith("own") and accumulation == 3:
        # The second micro-batch has no loss, for which stock puts that of the first. And stock adds the three up: it takes
        # a model that is given the number of labels to divide by it.
        expected[0] = 3 * sum(own_losses(MODELS[name], [0, 4])) / 2
    assert losses(ours) == pytest.approx(expected, rel=1e-6)
    for (parameter, ours_is), stock_is in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(ours_is, stock_is, rtol=0, atol=1e-6, msg=lambda text, at=parameter: f"{at}: {text}")


def test_the_head_sees_labelled_positions_alone(tmp_path: Path) -> None:
    seen = []

    class Spying(LabelLogitsTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(tuple(output.shape)))

    trainer = trained(Spying, MODELS["llama"], str(tmp_path), 3)
    labels = [torch.stack([row["labels"] for row in rows()[i : i + 2]]) for i in range(0, 12, 2)]
    assert seen[:6] == [(max(1, int((batch[:, 1:] != -100).sum())), 97) for batch in labels]
    ids = rows()[0]["input_ids"][None]
    assert trainer.model(input_ids=ids).logits.shape == (1, 16, 97)  # others who call the model get what they expect


def test_positions_are_those_before_the_labels() -> None:
    kept = labelled_positions(torch.tensor([[-100, -100, 7, -100, 9], [5, -100, -100, -100, -100]]))
    assert kept.tolist() == [[False, True, False, True, False], [False] * 5]  # a label at position 0 predicts nothing
    assert labelled_positions(torch.full((2, 3), -100)).sum() == 1


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (
            T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)),
            {},
        ),
        (AutoModelForCausalLM.from_config(MODELS["llama"]), {"label_smoothing_factor": 0.1}),
    ],
    ids=["encoder and decoder", "label smoothing"],
)
def test_others_take_the_stock_way(model: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **changes)
    assert not LabelLogitsTrainer(model, args, train_dataset=rows()).labelled_only


@pytest.mark.multirank
def test_it_trains_as_the_stock_trainer_does_under_zero_3(tmp_path: Path) -> None:
    """Also where one rank's micro-batch has labels and the other's has none."""
    for rank in run_ranks(2, compare_on_ranks, tmp_path, str(tmp_path)):
        for case, (stock, ours, difference) in rank.items():
            assert ours == pytest.approx(stock, rel=1e-5), case
            assert difference < 1e-6, case


def compare_on_ranks(folder: str) -> dict[str, Any]:
    import deepspeed

    zero = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    zero |= {"zero_optimization": {"stage": 3, "reduce_bucket_size": 100000}, "zero_allow_untested_optimizer": True}
    results = {}
    shape = MODELS["softcapping"]  # and tied, as Gemma is
    for accumulation in (1, 3):
        changes = {"deepspeed": zero, "max_steps": 2}
        stock, ours = (trained(kind, shape, folder, accumulation, **changes) for kind in (Trainer, LabelLogitsTrainer))
        difference = 0.0
        for one, other in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([one, other]):
                difference = max(difference, float((one - other).abs().max()))
        results[f"accumulation {accumulation}"] = losses(stock), losses(ours), difference
    return results
