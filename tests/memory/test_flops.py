"""FLOPs from the shape, against those that torch counts in real models; and peaks by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from lisa_ds.errors import ConfigError
from lisa_ds.flops import ComputeShape, Cost, Trained, cost, peak_flops
from lisa_ds.integrations.throughput import compute_shape, trained
from lisa_ds.layers import LayerStack

ROWS, LENGTH, LAYERS = 3, 20, 4
LLAMA = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=2),
    "tied llama, wide heads": LlamaConfig(**LLAMA, num_attention_heads=4, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    ),  # tied
}
ROLES = ("embeddings", "lm_head", "rest")


def listed(names: set[Any]) -> str:
    """A set in the same order in every process."""
    return "+".join(map(str, sorted(names))) or "none"


def prepared(name: str, sampled: set[int], never: set[str]) -> tuple[Any, LayerStack]:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").float()
    stack = LayerStack.from_model(model)
    units: list[int | str] = [*range(LAYERS), *ROLES]
    for unit in units:
        for parameter in stack.parameters(unit):
            parameter.requires_grad_(unit in sampled if isinstance(unit, int) else unit not in never)
    return model, stack


def counted(model: Any) -> int:
    """FLOPs of forward and backward."""
    ids = torch.randint(0, 97, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return int(counter.get_total_flops())


def predicted(model: Any, stack: LayerStack) -> tuple[Cost, float]:
    shape = compute_shape(model, stack)
    assert shape is not None
    spent = cost(shape, trained(model, stack))
    return spent, spent.model(ROWS * LENGTH, ROWS * LENGTH**2, ROWS * LENGTH)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampled", [{0, 1, 2, 3}, {1}, {0, 3}, {3}, set()], ids=listed)
@pytest.mark.parametrize("never", [set(), {"embeddings"}, {"embeddings", "lm_head", "rest"}, {"lm_head"}], ids=listed)
def test_flops_are_those_that_torch_counts(name: str, sampled: set[int], never: set[str]) -> None:
    if not sampled and {"embeddings", "rest"} <= never:
        pytest.skip("nothing trains")
    model, stack = prepared(name, sampled, never)
    assert predicted(model, stack)[1] == counted(model)


@pytest.mark.parametrize("name", MODELS)
def test_full_training_is_the_formula_of_palm(name: str) -> None:
    model, stack = prepared(name, set(range(LAYERS)), set())
    _, flops = predicted(model, stack)
    matrices = [weight for part, weight in model.named_parameters() if weight.dim() > 1 and "wpe" not in part]
    weights = sum(weight.numel() for weight in matrices)  # a tied weight is the head's
    weights -= 0 if stack.tied else model.get_input_embeddings().weight.numel()
    config = model.config
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 4)
    assert flops / (ROWS * LENGTH) == 6 * weights + 12 * LAYERS * width * LENGTH


@pytest.mark.parametrize(("sampled", "never"), [({0, 1, 2, 3}, set()), ({2}, {"embeddings"})], ids=listed)
def test_checkpointing_computes_the_blocks_again_that_backward_comes_to(sampled: set[int], never: set[str]) -> None:
    model, stack = prepared("llama", sampled, never)
    spent, once = predicted(model, stack)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # as LISA's engine does: it drags backward down to the embeddings
    extra = counted(model) - once
    again = spent.recomputed_per_token * ROWS * LENGTH + spent.recomputed_per_pair * ROWS * LENGTH**2
    assert spent.hardware(ROWS * LENGTH, ROWS * LENGTH**2, ROWS * LENGTH, recomputes=True) == once + again
    # Torch stops as soon as it has what was not saved: before the last matrix of each block.
    last = 2 * 32 * 48 * ROWS * LENGTH * len(range(min(sampled) if never else 0, LAYERS))
    assert extra == again - last


def test_a_block_less_is_cheaper_and_a_lower_one_dearer_where_embeddings_are_frozen() -> None:
    shape = ComputeShape(blocks=(100,) * 10, attention=8, head=50)

    def tokens_cost(*blocks: int, embeddings: bool) -> float:
        return cost(shape, Trained(frozenset(blocks), embeddings=embeddings)).per_token

    assert tokens_cost(2, 5, embeddings=True) == tokens_cost(8, 9, embeddings=True) == 2 * (1000 + 1000 + 200)
    assert tokens_cost(8, 9, embeddings=False) == 2 * (1000 + 200 + 200)
    assert tokens_cost(2, 5, embeddings=False) == 2 * (1000 + 800 + 200)


def test_models_that_are_not_described_have_no_shape() -> None:
    from transformers import MixtralConfig, T5Config, T5ForConditionalGeneration

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    mixture = AutoModelForCausalLM.from_config(MixtralConfig(**LLAMA, **sizes))
    assert compute_shape(mixture, LayerStack.from_model(mixture)) is None
    translator = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    assert compute_shape(translator, LayerStack.from_model(translator)) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-PCIE-32GB", 112.0),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10G", None),
        ("CPU", None),
    ],
)
def test_peaks_by_name(name: str, tflops: float | None) -> None:
    assert peak_flops(name, {}) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(name, {"LISA_DS_PEAK_TFLOPS": "12.5"}) == 12.5e12


@pytest.mark.parametrize("given", ["fast", "0", "-1", "nan", "inf"])
def test_a_peak_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigError) as error:
        peak_flops("CPU", {"LISA_DS_PEAK_TFLOPS": given})
    assert str(error.value) == (
        f"LISA_DS_PEAK_TFLOPS: should be the dense TFLOP/s of one GPU, a number above 0, got {given!r}; or leave it out"
    )
