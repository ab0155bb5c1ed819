"""A model's forward pass as a list of operations: the output of each, and what autograd saves for backward.

The operations are those of transformers' own modules, with attention that keeps no scores (``sdpa``, flash) where they have
it: BLOOM's has not. Sizes are in bytes. Nothing here knows of ranks; :mod:`lisa_ds.memory.step` runs the list forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lisa_ds.memory.architectures import Architecture, Module

FP32 = 4
LIGER_CHUNK = 1
"""Liger computes logits in chunks of about this many times the size of the hidden states."""


@dataclass(frozen=True)
class Op:
    """One operation."""

    out: str
    size: int
    """Bytes of its output."""

    reads: tuple[str, ...]
    """Tensors that get a gradient from it."""

    keeps: tuple[str, ...] = ()
    """Its inputs and outputs that are saved for backward."""

    scratch: int = 0
    """Bytes allocated only while it runs, beside the output."""

    module: int | None = None
    """Index of the module whose parameters it reads."""


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters in one block."""

    rank: int
    places: frozenset[int]
    """Places, in the block, of the linears that have one."""

    mask_width: int = 0
    """Bytes of an element of the mask that dropout keeps; 0 without dropout."""

    dora: bool = False
    """Whether a magnitude trains for each output."""


@dataclass
class Tape:
    """Operations on ``x``; the last one's output is the result."""

    tokens: int
    width: int
    """Bytes of an element of the model's type."""

    trains: bool | frozenset[int]
    """Whether the parameters get a gradient, or the indices of the modules whose do."""

    all_inputs: bool = False
    """Whether linears keep their input also where the weight is frozen, as DeepSpeed's own do."""

    adapters: Adapters | None = None
    """LoRA adapters beside linears; they always train."""

    sequence: int = 0
    """Tokens of a row."""

    ops: list[Op] = field(default_factory=list)
    modules: list[Module] = field(default_factory=list)
    places: list[int | None] = field(default_factory=list)
    """Of each module its place among those of its part of the model; None for an adapter's."""

    @property
    def out(self) -> str:
        """Name of the last operation's output."""
        return self.ops[-1].out

    def trained(self, module: int) -> bool:
        """Whether the parameters of a module get a gradient."""
        place = self.places[module]
        if place is None:
            return True
        return self.trains if isinstance(self.trains, bool) else place in self.trains

    def enter(self, module: Module, *, adapter: bool = False) -> int:
        """Add a module, and return its index."""
        self.places.append(None if adapter else sum(place is not None for place in self.places))
        self.modules.append(module)
        return len(self.modules) - 1

    def add(self, name: str, elements: int, reads: tuple[str, ...], keeps: tuple[str, ...] = (), **more: int) -> str:
        """Add an element-wise or similar operation, in the model's type; ``elements`` per token."""
        self.ops.append(Op(name, self.tokens * elements * self.width, reads, keeps, **more))
        return name

    def linear(self, name: str, module: Module, reads: str) -> str:
        """Add a matrix product, with its adapter if it has one; backward needs its input if the weight trains."""
        index = self.enter(module)
        keeps = (reads,) if self.trained(index) or self.all_inputs else ()
        out, place = module.shapes[0][0], self.places[index]
        if self.adapters is None or place not in self.adapters.places:
            return self.add(name, out, (reads,), keeps, module=index)
        return self._adapted(name, module, reads, self.add(f"{name}.base", out, (reads,), keeps, module=index))

    def _adapted(self, name: str, linear: Module, reads: str, base: str) -> str:
        """The sum of a linear's output and its adapter's, as PEFT computes it: base(x) + scaling * up(down(dropout(x)))."""
        assert self.adapters is not None
        (out, into), rank = linear.shapes[0], self.adapters.rank
        if self.adapters.mask_width:  # with its mask, which lives as long
            self.ops.append(
                Op(f"{name}.dropped", self.tokens * into * (self.width + self.adapters.mask_width), (reads,))
            )
            reads = f"{name}.dropped"
        for part, size, shape in (("down", rank, (rank, into)), ("up", out, (out, rank))):
            index = self.enter(Module("linear", (shape,), shape[1]), adapter=True)
            reads = self.add(f"{name}.{part}", size, (reads,), (reads,), module=index)
        if not self.adapters.dora:
            return self.add(name, out, (base, self.add(f"{name}.scaled", out, (reads,))))
        # base + (magnitude - 1) * base + magnitude * scaling * up; the norms are those of the whole updated matrix.
        index = self.enter(Module("linear", ((out,),)), adapter=True)
        whole = (3 * out * into + into * into) * self.width
        turned = self.add(f"{name}.turned", out, (base,), (base,), module=index, scratch=whole)
        scaled = self.add(f"{name}.scaled", out, (self.add(f"{name}.long", out, (reads,), (reads,)),))
        return self.add(name, out, (base, self.add(f"{name}.dora", out, (turned, scaled))))

    def norm(self, name: str, module: Module, reads: str, kind: str, elements: int) -> str:
        """Add a norm over the last dimension; ``elements`` per token in all."""
        place, size = self.enter(module), self.tokens * elements
        if kind == "layer":
            return self.add(name, elements, (reads,), (reads,), module=place)
        groups = self.tokens * max(1, elements // module.width) * FP32
        source = reads
        if self.width != FP32:  # computed in fp32, from a copy
            source = f"{name}.fp32"
            self.ops.append(Op(source, size * FP32, (reads,)))
        scale, scaled = f"{name}.scale", f"{name}.scaled"
        self.ops.append(Op(scale, groups, (source,), (source, scale), scratch=size * FP32))
        self.ops.append(Op(scaled, size * FP32, (source, scale), (source, scale)))
        if self.width != FP32:
            scaled = self.add(f"{name}.cast", elements, (scaled,))
        return self.add(name, elements, (scaled,), (scaled,) if self.trained(place) else (), module=place)


def embedding(architecture: Architecture, tape: Tape) -> None:
    """Token (and position) embeddings: ``hidden`` elements per token."""
    hidden = architecture.sizes.hidden
    for number, module in enumerate(architecture.embeddings):
        tape.enter(module)
        tape.add(f"embedding{number}", hidden, (), module=number)
    if len(architecture.embeddings) > 1:
        tape.add("sum", hidden, tuple(f"embedding{i}" for i in range(len(architecture.embeddings))))


def block(architecture: Architecture, tape: Tape) -> None:
    """One block, from ``x`` to its output."""
    sizes, modules = architecture.sizes, iter(architecture.block)
    norm_kind, hidden, kind = sizes.norm, sizes.hidden, architecture.kind

    def norm(name: str, reads: str, elements: int = hidden) -> str:
        return tape.norm(name, next(modules), reads, norm_kind, elements)

    parallel = kind in ("phi", "gpt_neox")  # attention and MLP read the same residual
    source = "x" if kind == "olmo2" else norm("norm1", "x")
    attended = _attention(architecture, tape, modules, source)
    if kind in ("gemma2", "olmo2"):
        attended = norm("norm2", attended)
    if parallel:
        inner = source if kind == "phi" else norm("norm2", "x")
        fed = _mlp(architecture, tape, modules, inner)
        tape.add("out", hidden, (tape.add("both", hidden, (attended, fed)), "x"))
        return
    tape.add("middle", hidden, ("x", attended))
    inner = "middle" if kind == "olmo2" else norm("norm3", "middle")
    fed = _mlp(architecture, tape, modules, inner)
    if kind in ("gemma2", "olmo2"):
        fed = norm("norm4", fed)
    tape.add("out", hidden, ("middle", fed))


def _attention(architecture: Architecture, tape: Tape, modules: Iterator[Module], source: str) -> str:
    sizes = architecture.sizes
    fused = architecture.kind in ("phi3", "gpt2", "gpt_neox", "bloom")
    if fused:
        qkv = tape.linear("qkv", next(modules), source)
        query, key, value = qkv, qkv, qkv
    else:
        query, key, value = (tape.linear(name, next(modules), source) for name in "qkv")
    if architecture.kind in ("qwen3", "olmo2"):
        query = tape.norm("q.norm", next(modules), query, sizes.norm, sizes.query)
        key = tape.norm("k.norm", next(modules), key, sizes.norm, sizes.key)
    if architecture.kind not in (
        "gpt2",
        "opt",
        "bloom",
    ):  # rotary: x * cos + rotate(x) * sin, whose factors all blocks share
        query = _rotate(tape, query, sizes.query)
        key = _rotate(tape, key, sizes.key)
    read = tuple(dict.fromkeys((query, key, value)))
    if architecture.kind == "bloom":
        return _scored_attention(architecture, tape, modules, read)
    logsumexp = tape.tokens * sizes.num_heads * FP32
    tape.ops.append(Op("attention", tape.tokens * sizes.query * tape.width + logsumexp, read, (*read, "attention")))
    return tape.linear("o", next(modules), "attention")


def _scored_attention(architecture: Architecture, tape: Tape, modules: Iterator[Module], read: tuple[str, ...]) -> str:
    """Attention as products of matrices: a score for each pair of tokens and each head."""
    pairs = architecture.sizes.num_heads * tape.sequence  # for each token
    parts = tape.add("qkv.parts", 3 * architecture.sizes.query, read)  # by head, contiguous
    scores = tape.add("scores", pairs, (parts,), (parts,))
    masked = tape.add("scores.masked", pairs, (scores,))
    tape.ops.append(Op("scores.softmax", tape.tokens * pairs * FP32, (masked,), ("scores.softmax",)))
    chances = tape.add("scores.cast", pairs, ("scores.softmax",)) if tape.width != FP32 else "scores.softmax"
    context = tape.add("context", architecture.sizes.query, (chances, parts), (chances, parts))
    merged = tape.add("attention", architecture.sizes.query, (context,))
    return tape.linear("o", next(modules), merged)


def _rotate(tape: Tape, name: str, elements: int) -> str:
    first = tape.add(f"{name}.cos", elements, (name,))
    turned = tape.add(f"{name}.turned", elements, (name,), scratch=tape.tokens * elements * tape.width // 2)
    second = tape.add(f"{name}.sin", elements, (turned,))
    return tape.add(f"{name}.rotated", elements, (first, second))


def _mlp(architecture: Architecture, tape: Tape, modules: Iterator[Module], source: str) -> str:
    sizes = architecture.sizes
    width = sizes.intermediate * sizes.active_experts
    if architecture.kind == "mixtral":
        tape.linear("router", next(modules), source)
        place = tape.enter(next(modules))
        chosen = tape.add("chosen", sizes.hidden * sizes.active_experts, (source,))
        both = tape.add(
            "up", 2 * width, (chosen,), (chosen,) if tape.trained(place) or tape.all_inputs else (), module=place
        )
        act = tape.add("act", width, (both,), (both,))
        product = tape.add("product", width, (act, both), (act, both))
        keeps = (product,) if tape.trained(place) or tape.all_inputs else ()
        down = tape.add("down", sizes.hidden * sizes.active_experts, (product,), keeps)
        return tape.add("mixed", sizes.hidden, (down,), (down,))
    if not sizes.gated:
        up = tape.linear("up", next(modules), source)
        if architecture.kind in ("gpt2", "phi"):  # gelu_new, written out in element-wise operations
            half = tape.add("half", width, (up,))
            bent = tape.add("tanh", width, (up,), (up, "tanh"), scratch=tape.tokens * width * tape.width)
            more = tape.add("more", width, (bent,))
            act = tape.add("act", width, (half, more), (half, more))
        else:
            act = tape.add("act", width, (up,), (up,))
        return tape.linear("down", next(modules), act)
    if architecture.kind == "phi3":
        both = tape.linear("up", next(modules), source)
        act = tape.add("act", width, (both,), (both,))
        product = tape.add("product", width, (act, both), (act, both))
    else:
        gate = tape.linear("gate", next(modules), source)
        act = tape.add("act", width, (gate,), (gate,))
        up = tape.linear("up", next(modules), source)
        product = tape.add("product", width, (act, up), (act, up))
    return tape.linear("down", next(modules), product)


def head(architecture: Architecture, tape: Tape, *, fused: bool = False) -> None:
    """From the last block's output ``x`` to the loss: final norm, logits of every token, softmax in fp32.

    ``fused``: as in Liger, which computes logits for a few tokens at a time and their gradient at once; the gradient of
    the hidden states is saved (its ops/fused_linear_cross_entropy.py).
    """
    sizes = architecture.sizes
    normed = tape.norm("final", architecture.final[0], "x", sizes.norm, sizes.hidden)
    (module,) = architecture.head
    shapes = module.shapes if not architecture.tied else ((sizes.vocab, sizes.hidden), *module.shapes)
    if fused:
        rows = min(tape.tokens, _power_of_two(-(-tape.tokens // -(-sizes.vocab // (LIGER_CHUNK * sizes.hidden)))))
        weight = sizes.vocab * sizes.hidden * tape.width if tape.trains else 0
        place = tape.enter(Module("head", shapes, sizes.hidden))
        size = rows * sizes.vocab * tape.width
        tape.ops.append(Op("logits", size, (normed,), scratch=weight, module=place))
        tape.ops.append(Op("logits.done", tape.tokens * sizes.hidden * tape.width, ("logits",), ("logits.done",)))
        tape.ops.append(Op("loss", FP32, ("logits.done",)))
        return
    logits = tape.linear("logits", Module("head", shapes, sizes.hidden), normed)
    source, size = logits, tape.tokens * sizes.vocab * FP32
    if tape.width != FP32:
        source = "logits.fp32"
        tape.ops.append(Op(source, size, (logits,)))
    tape.ops.append(Op("softmax", size, (source,), ("softmax",)))
    tape.ops.append(Op("loss", FP32, ("softmax",), ("softmax",)))


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
