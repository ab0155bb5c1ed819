"""Reads a model's ``config.json`` into the shapes of its parameters, module by module, without torch.

A model is described by its modules in the order in which they run. From that follow the elements of each parameter (to
plan state), the sizes of its matrices (for adapters and projections), and the tensors of a forward pass (activations).
Tests compare the shapes with transformers' own, for every architecture here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from lisa_ds.config.targets import Targets, chosen
from lisa_ds.errors import ModelError
from lisa_ds.memory.modules import Module as Module
from lisa_ds.memory.modules import Sizes as Sizes
from lisa_ds.memory.state import ModelShape

MOST_LAYERS = 10_000
"""More layers than any model has; refused beyond, as a plan goes through them one by one."""


@dataclass(frozen=True)
class Architecture:
    """A model, taken apart without being built."""

    kind: str
    """transformers' ``model_type``."""

    embeddings: tuple[Module, ...]
    block: tuple[Module, ...]
    """The modules of one block; all blocks are alike."""

    num_layers: int
    final: tuple[Module, ...]
    """The modules after the blocks, before the head."""

    head: tuple[Module, ...]
    """The output head; its weight is not in ``shapes`` if it is tied."""

    tied: bool
    sizes: Sizes
    path: str = "model.layers"
    """Where the blocks are in transformers' model."""

    @property
    def shape(self) -> ModelShape:
        """Elements of each parameter, by unit."""

        def numels(modules: tuple[Module, ...]) -> tuple[int, ...]:
            return tuple(numel for module in modules for numel in module.numels)

        return ModelShape(
            layers=(numels(self.block),) * self.num_layers,
            embeddings=numels(self.embeddings),
            lm_head=numels(self.head),
            rest=numels(self.final),
            tied=self.tied,
        )

    def chosen(self, targets: Targets, *, inside: bool, conv1d: bool) -> dict[int, frozenset[int]]:
        """By block, the places in :attr:`block` of the linears that ``targets`` names; arguments as of :func:`lisa_ds.models.linears.linears`."""
        if self.kind == "gpt2" and not conv1d:  # all of its linears are
            return {}
        named = [(place, module.name) for place, module in enumerate(self.block) if module.name]
        found = {
            block: frozenset(
                place for place, name in named if chosen(targets, f"{self.path}.{block}.{name}", inside=inside)
            )
            for block in range(self.num_layers)
        }
        return {block: places for block, places in found.items() if places}

    def linears(self, targets: Targets, *, inside: bool, conv1d: bool) -> list[tuple[int, int]]:
        """``(out, in)`` of each linear of all blocks that ``targets`` names; arguments as of :meth:`chosen`."""
        by_block = self.chosen(targets, inside=inside, conv1d=conv1d)
        matrices = [self.block[place].shapes[0] for places in by_block.values() for place in sorted(places)]
        return [(out, into) for out, into in matrices]

    def adapters(self, targets: Targets, rank: int, *, dora: bool = False) -> list[int]:
        """Elements of each matrix of LoRA's adapters: ``rank x in`` and ``out x rank``, and DoRA's magnitudes, ``out``."""
        sizes = []
        for out, into in self.linears(targets, inside=False, conv1d=True):
            sizes += [rank * into, rank * out, *([out] if dora else [])]
        return sizes

    @property
    def modules(self) -> tuple[Module, ...]:
        """Each kind of module once."""
        return (*self.embeddings, *self.block, *self.final, *self.head)

    def split(self, ways: int) -> Architecture:
        """The largest share of a rank under tensor parallelism: block matrices and activations, split ``ways`` ways.

        Attention is split by key-value heads; where these or the MLP do not divide evenly, some ranks have less.

        Raises:
            ModelError: There are fewer key-value heads than ranks.
        """
        if ways == 1:
            return self
        sizes = self.sizes
        if ways > sizes.num_key_heads:
            raise ModelError(
                f"tensor_parallel: attention is cut by key-value heads, of which there are {sizes.num_key_heads}, got {ways}"
            )
        heads = -(-sizes.num_key_heads // ways)
        shares = {
            "attention": Fraction(heads, sizes.num_key_heads),
            "mlp": Fraction(-(-sizes.intermediate // ways), sizes.intermediate),
        }

        def cut(module: Module) -> Module:
            if module.part not in shares:
                return module
            (out, into), *bias = module.shapes
            share = shares[module.part]
            if module.by_row:
                return replace(module, shapes=((out, int(into * share)), *bias), width=int(into * share))
            return replace(module, shapes=((int(out * share), into), *((int(size * share),) for (size,) in bias)))

        of_heads = shares["attention"]
        return replace(
            self,
            block=tuple(cut(module) for module in self.block),
            sizes=replace(
                sizes,
                query=int(sizes.query * of_heads),
                key=int(sizes.key * of_heads),
                intermediate=int(sizes.intermediate * shares["mlp"]),
                num_heads=int(sizes.num_heads * of_heads),
                num_key_heads=heads,
            ),
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied weight counts once."""
        return sum(self.shape.all())

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> Architecture:
        """Read a Hugging Face ``config.json``.

        Args:
            config: Its keys and values; those that it leaves out have transformers' defaults.
            where: What it is called in messages.

        Raises:
            ModelError: It is of an architecture that is not known here, or lacks a size.
        """
        kind = str(config.get("model_type"))
        if kind not in _READERS:
            raise ModelError(
                f"{where}: model_type: the planner knows {', '.join(sorted(_READERS))}, got {kind!r}; a run of any other "
                "model is planned from the model itself by launch/train.py"
            )
        try:
            architecture = _READERS[kind](kind, config)
        except KeyError as missing:
            raise ModelError(f"{where}: {missing.args[0]}: required to plan a {kind!r} model, got nothing") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(f"{where}: a size is not a number that fits the others: {error}") from None
        shapes = [size for module in architecture.modules for shape in module.shapes for size in shape]
        sizes = dataclasses.asdict(architecture.sizes)
        for size in (architecture.num_layers, *shapes, *(sizes[key] for key in sizes if key not in ("gated", "norm"))):
            if type(size) is not int or not 1 <= size < 2**40:
                raise ModelError(f"{where}: a size is not a whole number, 1 or more, got {size!r}")
        if architecture.num_layers > MOST_LAYERS:
            raise ModelError(
                f"{where}: a model of at most {MOST_LAYERS} layers is planned, got {architecture.num_layers}"
            )
        return architecture


def _linear(into: int, out: int, bias: bool = False, *, part: str, by_row: bool = False, name: str = "") -> Module:
    return Module("linear", ((out, into), *(((out,),) if bias else ())), into, part, by_row, name)


def _norm(width: int, bias: bool = False) -> Module:
    return Module("norm", ((width,),) * (2 if bias else 1), width)


def _head(config: Mapping[str, Any], hidden: int, vocab: int, *, tied: bool, bias: bool = False) -> Module:
    weight = () if tied else ((vocab, hidden),)
    return Module("head", (*weight, *(((vocab,),) if bias else ())), hidden)


def _llama(kind: str, config: Mapping[str, Any]) -> Architecture:
    """Llama and those built like it: RMS norms, rotary embeddings, grouped queries, a gated MLP."""
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    per_head = config.get("head_dim") or (256 if kind in ("gemma", "gemma2") else hidden // heads)
    query, key = heads * per_head, key_heads * per_head
    attention_bias = bool(config.get("attention_bias", False))
    qkv_bias = attention_bias or kind == "qwen2"
    mlp_bias = bool(config.get("mlp_bias", False)) and kind == "llama"
    tied = bool(config.get("tie_word_embeddings", kind in ("gemma", "gemma2")))
    of_heads, of_mlp = functools.partial(_linear, part="attention"), functools.partial(_linear, part="mlp")
    if kind == "phi3":
        attention = [
            of_heads(hidden, query + 2 * key, name="self_attn.qkv_proj"),
            of_heads(query, hidden, by_row=True, name="self_attn.o_proj"),
        ]
        mlp = [
            of_mlp(hidden, 2 * intermediate, name="mlp.gate_up_proj"),
            of_mlp(intermediate, hidden, by_row=True, name="mlp.down_proj"),
        ]
    else:
        attention = [of_heads(hidden, query, qkv_bias, name="self_attn.q_proj")]
        attention += [of_heads(hidden, key, qkv_bias, name=f"self_attn.{name}_proj") for name in ("k", "v")]
        attention += {"qwen3": [_norm(per_head)] * 2, "olmo2": [_norm(query), _norm(key)]}.get(kind, [])
        attention.append(of_heads(query, hidden, attention_bias, by_row=True, name="self_attn.o_proj"))
        mlp = [of_mlp(hidden, intermediate, mlp_bias, name=f"mlp.{name}_proj") for name in ("gate", "up")]
        mlp.append(of_mlp(intermediate, hidden, mlp_bias, by_row=True, name="mlp.down_proj"))
    experts = 1
    if kind == "mixtral":
        count, experts = config["num_local_experts"], config.get("num_experts_per_tok", 2)
        weights = ((count, 2 * intermediate, hidden), (count, hidden, intermediate))
        mlp = [_linear(hidden, count, part=""), Module("experts", weights, hidden)]
    norm = _norm(hidden)
    block = {
        "gemma2": (norm, *attention, norm, norm, *mlp, norm),
        "olmo2": (*attention, norm, *mlp, norm),
    }.get(kind, (norm, *attention, norm, *mlp))
    return Architecture(
        kind=kind,
        embeddings=(Module("embedding", ((vocab, hidden),)),),
        block=block,
        num_layers=config["num_hidden_layers"],
        final=(norm,),
        head=(_head(config, hidden, vocab, tied=tied),),
        tied=tied,
        sizes=Sizes(
            hidden, query, key, intermediate, heads, key_heads, vocab, gated=True, norm="rms", active_experts=experts
        ),
    )


def _gpt2(kind: str, config: Mapping[str, Any]) -> Architecture:
    hidden, vocab, heads = config["n_embd"], config["vocab_size"], config["n_head"]
    intermediate = config.get("n_inner") or 4 * hidden
    tied = bool(config.get("tie_word_embeddings", True))
    positions = config.get("n_positions", 1024)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return _plain(
        kind, config["n_layer"], hidden, heads, intermediate, vocab, tied, (positions,), names, path="transformer.h",
    )  # fmt: skip


def _gpt_neox(kind: str, config: Mapping[str, Any]) -> Architecture:
    sizes = (config["hidden_size"], config["num_attention_heads"], config["intermediate_size"], config["vocab_size"])
    tied, bias = bool(config.get("tie_word_embeddings", False)), bool(config.get("attention_bias", True))
    names = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return _plain(
        kind, config["num_hidden_layers"], *sizes, tied, (), names, path="gpt_neox.layers", attention_bias=bias
    )


def _opt(kind: str, config: Mapping[str, Any]) -> Architecture:
    hidden = config["hidden_size"]
    if config.get("word_embed_proj_dim", hidden) != hidden or not config.get("do_layer_norm_before", True):
        raise ModelError(
            "config.json: word_embed_proj_dim: the planner knows OPT models without projections of the embeddings"
        )
    sizes = (hidden, config["num_attention_heads"], config["ffn_dim"], config["vocab_size"])
    positions = config["max_position_embeddings"] + 2  # the first two are for padding
    tied = bool(config.get("tie_word_embeddings", True))
    names = (*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "fc1", "fc2")
    return _plain(kind, config["num_hidden_layers"], *sizes, tied, (positions,), names, path="model.decoder.layers")


def _phi(kind: str, config: Mapping[str, Any]) -> Architecture:
    sizes = (config["hidden_size"], config["num_attention_heads"], config["intermediate_size"], config["vocab_size"])
    tied = bool(config.get("tie_word_embeddings", False))
    names = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v")), "self_attn.dense", "mlp.fc1", "mlp.fc2")
    return _plain(
        kind, config["num_hidden_layers"], *sizes, tied, (), names, path="model.layers", head_bias=True, norms=1,
    )  # fmt: skip


def _bloom(kind: str, config: Mapping[str, Any]) -> Architecture:
    hidden = config.get("n_embed") or config["hidden_size"]
    names = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    tied = bool(config.get("tie_word_embeddings", True))
    sizes = (hidden, config["n_head"], 4 * hidden, config["vocab_size"])
    plain = _plain(kind, config["n_layer"], *sizes, tied, (), names, path="transformer.h")
    return replace(plain, final=(_norm(hidden, bias=True), *plain.final))  # one comes after the embeddings


def _plain(
    kind: str,
    num_layers: int,
    hidden: int,
    heads: int,
    intermediate: int,
    vocab: int,
    tied: bool,
    positions: tuple[int, ...],
    names: tuple[str, ...],
    *,
    path: str,
    attention_bias: bool = True,
    head_bias: bool = False,
    norms: int = 2,
) -> Architecture:
    """GPT-2 and those built like it: layer norms, biases, an MLP of two matrices; with four ``names``, queries, keys and values are fused."""
    norm = _norm(hidden, bias=True)
    of_heads, of_mlp = functools.partial(_linear, part="attention"), functools.partial(_linear, part="mlp")
    *of_queries, out, up, down = names
    if len(of_queries) == 1:
        projections = [of_heads(hidden, 3 * hidden, attention_bias, name=of_queries[0])]
    else:
        projections = [of_heads(hidden, hidden, True, name=name) for name in of_queries]
    attention = [*projections, of_heads(hidden, hidden, attention_bias, by_row=True, name=out)]
    mlp = [of_mlp(hidden, intermediate, True, name=up), of_mlp(intermediate, hidden, True, by_row=True, name=down)]
    return Architecture(
        kind=kind,
        embeddings=tuple(Module("embedding", ((rows, hidden),)) for rows in (vocab, *positions)),
        block=(norm, *attention, *[norm] * (norms - 1), *mlp),
        num_layers=num_layers,
        final=(norm,),
        head=(_head({}, hidden, vocab, tied=tied, bias=head_bias),),
        tied=tied,
        sizes=Sizes(hidden, hidden, hidden, intermediate, heads, heads, vocab, gated=False, norm="layer"),
        path=path,
    )


_READERS: dict[str, Callable[[str, Mapping[str, Any]], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2"), _llama),
    "bloom": _bloom,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "phi": _phi,
}
KINDS_OF_MODEL = tuple(sorted(_READERS))
"""Every ``model_type`` that can be planned from its config alone."""
