"""A tiny random model of (nearly) every architecture that transformers lists as a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# What configurations call a size, and what it is here.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 97),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim", "lru_width"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "attention_hidden_size", "mamba_d_ssm"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner", "ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "mamba_expand"), 2),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "kv_channels", "q_lora_rank", "kv_lora_rank", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "qk_head_dim", "v_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "rotary_dim", "time_step_rank"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "type_vocab_size": 2},
}
_DERIVED = ("head_dim", "qk_head_dim", "v_head_dim", "num_key_value_heads")  # from others, in latent attention
_MOST_ELEMENTS = 30_000_000  # some have parts of another shape, which stay as large as they are


class CannotShrinkError(Exception):
    """The sizes here do not fit an architecture."""


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of the architecture ``name``, in fp32.

    Raises:
        CannotShrinkError: Its configuration wants other sizes than the usual ones.
    """
    kind = CONFIG_MAPPING[name]
    reason: Exception | None = None
    try:
        defaults = kind().to_dict()
    except Exception as error:
        raise CannotShrinkError(f"{name}: its own defaults: {error}") from error
    sizes = {key: size for key, size in _SIZES.items() if key in {*defaults, *kind.attribute_map}} | changes
    kinds_of_layer = defaults.get("layer_types") or []  # one of each kind, in two layers
    sizes |= {"layer_types": [*dict.fromkeys(kinds_of_layer), *kinds_of_layer][-2:]} if kinds_of_layer else {}
    for changed in (sizes, _without(sizes, "head_dim"), sizes | {"num_key_value_heads": 4}, _without(sizes, *_DERIVED)):
        try:
            shape = kind(**changed)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(shape).parameters())
            if count > _MOST_ELEMENTS:
                raise CannotShrinkError(f"{name}: has {count} parameters still")
            torch.manual_seed(0)
            shape.use_cache = False
            model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").float().eval()
            with torch.no_grad():
                model(torch.full((1, 8), 5))
            return model
        except Exception as error:
            reason = error
    raise CannotShrinkError(f"{name}: {type(reason).__name__}: {reason}")


def _without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: size for key, size in sizes.items() if key not in names}
