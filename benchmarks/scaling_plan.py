"""What benchmarks/scaling.py measures and its figure draws: the models, and what the planner says of a rank."""

from __future__ import annotations

from lisa_ds.memory import SAMPLED_KINDS, Architecture, ModelShape, full_state_bytes, state_bytes
from lisa_ds.memory.catalogue import require

SMALL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TINYLLAMA, LLAMA_7B, LLAMA_70B = (
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-3.1-70B",
)


def shape_of(model: str) -> ModelShape:
    """Elements of each parameter, from the config alone."""
    return Architecture.from_config(SMALL if model == "small" else require(model)).shape


def planned(shape: ModelShape, method: str, world_size: int) -> dict[str, int]:
    """Bytes of each kind on a rank, and bytes that enter reduce-scatter there: every trained parameter, padded to whole slices."""
    if method == "full":
        table = full_state_bytes(shape, world_size=world_size)
    else:
        table = state_bytes(shape, sampled=range(2), world_size=world_size)
    return {kind: table[kind] for kind in ("weights", *SAMPLED_KINDS)} | {
        "reduce_scatter": world_size * table["gradients"]
    }
