"""Simulates one training step from the first module to the last gradient: the bytes allocated on one rank.

The model's operations (:mod:`lisa_ds.memory.tape`) run forwards and backwards over a ledger, while ZeRO-3 gathers and releases
parameters (:mod:`lisa_ds.memory.gather`) and reduces gradients by buckets. Only what is temporary within a step is
counted here; model state, which stays, is in :mod:`lisa_ds.memory.state`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from lisa_ds.memory.architectures import Architecture, Module
from lisa_ds.memory.gather import Coordinator, GatherSettings
from lisa_ds.memory.gradients import Gradients, GradientSettings
from lisa_ds.memory.ledger import Ledger
from lisa_ds.memory.tape import Adapters, Tape, block, embedding, head

Sampled = Collection[int] | Mapping[int, frozenset[int]]
"""Blocks that train; or by block the indices of its modules that do."""


@dataclass(frozen=True)
class StepSettings:
    """The settings of a step, besides the model."""

    tokens: int
    """Tokens of a rank's micro-batch, padding included."""

    world_size: int
    sequence: int = 0
    """Tokens of a row, for attention that keeps its scores."""

    width: int = 2
    """Bytes of an element of weights and activations."""

    checkpointing: bool = False
    """Whether blocks keep only their input and are recomputed in backward (activation checkpointing)."""

    gradients: GradientSettings = field(default_factory=GradientSettings)
    forgets_inputs: bool = True
    """Whether frozen linears keep no input (LISA's engine) or do (DeepSpeed's)."""

    adapters: Mapping[int, Adapters] = field(default_factory=dict)
    """LoRA adapters, by block."""

    fused_loss: bool = False
    """Whether Liger computes head and loss together."""

    gather: GatherSettings = field(default_factory=GatherSettings)


@dataclass(frozen=True)
class StepPeaks:
    """The peak bytes of a step beyond model state, by kind."""

    forward: dict[str, int]
    backward: dict[str, int]
    persistent: int
    """Small parameters that are never released, whole."""


@dataclass(eq=False)
class _Section:
    """A part of the model that runs as one: the embeddings, a block, or the head."""

    index: int
    """Place among the sections; the embeddings are the first, the head is the last."""

    tape: Tape
    numbers: list[tuple[int, ...]]
    """Numbers of the parameters of each of the tape's modules."""

    trains: bool
    needs_input_grad: bool
    records: bool
    """Whether autograd records it: something in it gets a gradient."""

    checkpointed: bool = False


class _Step:
    def __init__(
        self, architecture: Architecture, settings: StepSettings, sampled: Sampled, roles: Collection[str]
    ) -> None:
        self._settings = settings
        self._ledger = Ledger()
        self._numels: dict[int, int] = {}
        whole = frozenset(range(len(architecture.block)))
        by_block = sampled if isinstance(sampled, Mapping) else dict.fromkeys(sampled, whole)
        self._sections = self._build(architecture, by_block, set(roles))
        self._trainable = {
            number
            for s in self._sections
            for module, numbers in enumerate(s.numbers)
            if s.tape.trained(module)
            for number in numbers
        } | self._always
        tied = self._sections[0].numbers[0] if architecture.tied else ()
        self._gradients = Gradients(
            self._numels, tied, settings.world_size, settings.width, settings.gradients, self._ledger
        )
        self._coordinator = Coordinator(
            self._numels, self._order(), settings.world_size, settings.width, settings.gather, self._ledger
        )
        self._visit = 0

    def run(self) -> StepPeaks:
        persistent = self._ledger.now
        for section in self._sections:
            self._forward(section, keep=section.records and not section.checkpointed)
        forward = self._ledger.at_peak
        self._ledger.restart()
        for section in reversed(self._sections):
            if section.records:
                self._backward(section)
        self._gradients.finish()
        return StepPeaks(forward, self._ledger.at_peak, persistent)

    # ---- the model ------------------------------------------------------------------------------------------------

    def _build(
        self, architecture: Architecture, sampled: Mapping[int, frozenset[int]], roles: set[str]
    ) -> list[_Section]:
        settings = self._settings
        self._always: set[int] = set()
        embeddings_train = "embeddings" in roles
        start = self._tape(trains=embeddings_train)
        embedding(architecture, start)
        self._hidden_bytes = start.ops[-1].size
        sections = [self._section(0, start, embeddings_train, False)]
        tied = sections[0].numbers[0]
        grad = embeddings_train
        beside: frozenset[int] = frozenset()
        if "block_rest" in roles:
            beside = frozenset(i for i, module in enumerate(architecture.block) if module.kind == "norm")
        tapes: dict[tuple[frozenset[int], Adapters | None], Tape] = {}  # most blocks are alike
        for index in range(architecture.num_layers):
            trained, adapters = sampled.get(index, frozenset()) | beside, settings.adapters.get(index)
            if (trained, adapters) not in tapes:
                tapes[trained, adapters] = tape = self._tape(trains=trained)
                tape.adapters = adapters
                block(architecture, tape)
            trains = bool(trained) or adapters is not None
            sections.append(self._section(index + 1, tapes[trained, adapters], trains, grad))
            sections[-1].checkpointed = settings.checkpointing and sections[-1].records
            grad = grad or trains
        head_role = "embeddings" if architecture.tied else "lm_head"
        tape = self._tape(trains=head_role in roles)
        head(architecture, tape, fused=settings.fused_loss)
        reaches = grad or "rest" in roles or head_role in roles
        sections.append(self._section(len(sections), tape, head_role in roles, reaches))
        sections[-1].records = True
        final, output = sections[-1].numbers[0], sections[-1].numbers[-1]
        if "rest" in roles:
            self._always.update(final)
        if architecture.tied:
            for number in output[:1]:
                del self._numels[number]
            sections[-1].numbers[-1] = (tied[0], *output[1:])
        return sections

    def _tape(self, *, trains: bool | frozenset[int]) -> Tape:
        settings = self._settings
        return Tape(
            settings.tokens, settings.width, trains, all_inputs=not settings.forgets_inputs, sequence=settings.sequence
        )

    def _section(self, index: int, tape: Tape, trains: bool, needs_input_grad: bool) -> _Section:
        numbers = [self._number(module) for module in tape.modules]
        return _Section(index, tape, numbers, trains, needs_input_grad, trains or needs_input_grad)

    def _number(self, module: Module) -> tuple[int, ...]:
        numbers = tuple(range(len(self._numels), len(self._numels) + len(module.numels)))
        self._numels.update(zip(numbers, module.numels, strict=True))
        return numbers

    def _order(self) -> list[tuple[int, ...]]:
        """The parameters of each module that a step comes to, in order."""
        order = [numbers for section in self._sections for numbers in section.numbers]
        for section in reversed(self._sections):
            if section.records:
                order += [*(section.numbers if section.checkpointed else ()), *reversed(section.numbers)]
        return order

    # ---- running it -----------------------------------------------------------------------------------------------

    def _forward(self, section: _Section, *, keep: bool) -> None:
        ops, ledger, place = section.tape.ops, self._ledger, self._place(section)
        readers = Counter(name for op in ops for name in op.reads)
        kept = {name for op in ops for name in op.keeps} if keep else set()
        if section.checkpointed:
            kept.add("x")
        in_head = self._is_head(section)
        for op in ops:
            if op.module is not None:
                self._fetch()
            ledger.briefly(place("scratch"), op.scratch)
            ledger.add(place(op.out), op.size)
            for name in op.reads:
                readers[name] -= 1
                if not readers[name] and name not in kept and not (in_head and name == "logits"):
                    ledger.drop(place(name))
            if op.module is not None:
                self._coordinator.release(self._visit - 1)
        if in_head and "logits" not in kept:
            ledger.drop(place("logits"))  # the model's output held them until the loss was known

    def _place(self, section: _Section) -> Callable[[str], str]:
        """A tensor's name in the ledger: a section's output is the next one's ``x``."""
        index, out, is_head = section.index, section.tape.out, self._is_head(section)

        def place(name: str) -> str:
            if name == out and not is_head:
                return f"activations/{index + 1}/x"
            return f"{'logits' if name.startswith(('logits', 'softmax')) else 'activations'}/{index}/{name}"

        return place

    def _is_head(self, section: _Section) -> bool:
        return section.index == len(self._sections) - 1

    def _fetch(self) -> None:
        self._coordinator.fetch()
        self._visit += 1

    def _backward(self, section: _Section) -> None:
        ledger, place, ops = self._ledger, self._place(section), section.tape.ops
        if section.checkpointed:
            self._forward(section, keep=True)
            ledger.drop(place(section.tape.out))
        sizes = {op.out: op.size for op in ops} | {"x": self._hidden_bytes}
        left = Counter(name for op in ops for name in op.keeps)
        for op in reversed(ops):
            visit = self._visit
            if op.module is not None:
                self._fetch()
            for name in dict.fromkeys(op.reads):
                if name == "x" and not section.needs_input_grad:
                    continue
                gradient = f"{place(name)}.grad"
                if gradient in ledger.sizes:
                    ledger.briefly(gradient, sizes[name])  # another reader's share, added in place
                else:
                    ledger.add(gradient, sizes[name])
            for number in section.numbers[op.module] if op.module is not None else ():
                if number in self._trainable:
                    self._gradients.made(number, in_head=self._is_head(section))
            ledger.drop(f"{place(op.out)}.grad")
            for name in op.keeps:
                left[name] -= 1
                if not left[name]:
                    ledger.drop(place(name))
            if op.module is not None:
                self._coordinator.release(visit)
        ledger.drop(place("x"))


def step_peaks(
    architecture: Architecture, settings: StepSettings, *, sampled: Sampled, roles: Collection[str]
) -> StepPeaks:
    """The peak bytes of a step beyond model state.

    Args:
        architecture: The model.
        settings: Batch, ranks, and how ZeRO-3 works.
        sampled: Blocks that train, or by block the indices of its modules that do.
        roles: Which of ``embeddings``, ``lm_head``, ``rest``, ``block_rest`` train.
    """
    return _Step(architecture, settings, sampled, roles).run()
