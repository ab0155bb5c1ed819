"""Takes a model apart: its blocks, its embeddings, its head, and the rest.

Nothing here depends on the names of an architecture. A *stack* is a container of blocks (``nn.ModuleList``,
``nn.Sequential``, or ``nn.ModuleDict`` with numbered keys) that lies in no block itself, so that the experts of a
mixture or the sublayers of a T5 block never pass for one. The parameters outside the blocks have three roles:

- ``embeddings``: of the model's input embedding and of every other ``nn.Embedding`` (positions, token types);
- ``lm_head``: of the output head, or of the classifier of a sequence classifier; a weight tied to the embeddings is
  theirs alone, and a bias beside it stays with the head;
- ``rest``: all others, such as the final norm, the norm after the embeddings, a pooler, the blocks of a vision tower.

Only identities and sizes of parameters are used, never their values: under ZeRO-3 a rank holds a partition of each.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any

from torch import nn

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import ROLES as ROLES
from lisa_ds.errors import ModelError
from lisa_ds.units import Drawn, assigned, matrices, numel

Unit = int | str
"""What is sampled or frozen as a whole: a block or a matrix by its index in :attr:`LayerStack.units`, or one of :data:`ROLES`."""

# What the head is called where the model does not say (`get_output_embeddings`): the first name that occurs is it.
_HEAD_NAMES = (
    *("lm_head", "embed_out", "output_layer", "score", "classifier", "classification_head", "qa_outputs"),
    *("head", "output"),
)
# How peers spell the model's own name at the start of a path: `model.model.layers` is our `model.layers`.
_ROOT_NAMES = {"model", "module", "base_model"}
# A container this much smaller than the largest is not in question (an adapter, a projector, a token predictor) ...
_RIVAL_SHARE = 0.1
# ... and one at least this much smaller than the best loses to it; nearer ones are the user's choice.
_CLEAR_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class LayerStack:
    """A model, taken apart into units. Every parameter is in exactly one."""

    layers: list[nn.Module]
    """The blocks, in the order they run; those of an encoder come before those of its decoder."""
    stacks: list[range]
    """Which indices of ``layers`` each stack holds: one range, or an encoder's and a decoder's."""
    paths: list[str]
    """Where each stack lies in the model, such as ``model.layers``."""
    embeddings: list[nn.Parameter]
    """The parameters of the embeddings, a tied head's weight among them."""
    lm_head: list[nn.Parameter]
    """The parameters of the head that are not tied."""
    rest: list[nn.Parameter]
    """All other parameters outside the blocks."""
    block_rest: list[nn.Parameter]
    """The small parameters of the blocks, where matrices are drawn and these are not."""
    adapters: list[nn.Parameter]
    """The parameters of adapters that train beside what is drawn (``lisa.adapters``). A PEFT model under LISA alone has none here: its
    adapters are part of its blocks."""
    units: list[Drawn]
    """What is drawn: the blocks, or the matrices in them."""
    tied: bool
    """Whether the head shares a weight with the embeddings."""
    by_matrices: bool
    """Whether the units are matrices, not blocks."""
    unit_of: dict[int, Unit]
    """``id(parameter)`` to its unit: an index of ``units``, or a role."""
    names: dict[int, str]
    """``id(parameter)`` to its name; the first one if it has several."""

    @classmethod
    def from_model(cls, model: nn.Module, layers_path: str = "auto") -> LayerStack:
        """Find the blocks of ``model``, and the role of every other parameter.

        Args:
            model: Any module: of transformers, wrapped by PEFT, or plain; partitioned by ZeRO-3 or not.
            layers_path: ``auto``, or the dotted path from ``model`` to the container of blocks; several, separated
                by commas, become one list of blocks in this order.

        Raises:
            ModelError: There is no stack of blocks, more than one could be meant, ``layers_path`` leads to none,
                or a parameter belongs to two blocks.
        """
        found = _containers(model)
        stacks = _detect(model, found) if layers_path == "auto" else _resolve(model, found, layers_path)
        layers = [block for stack in stacks for block in stack.blocks]
        ends = [sum(len(stack.blocks) for stack in stacks[: i + 1]) for i in range(len(stacks))]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        unit_of, tied = _assign(model, layers, names)
        roles: dict[Unit, list[nn.Parameter]] = {role: [] for role in ROLES}
        for parameter in model.parameters():
            if (unit := unit_of[id(parameter)]) in roles:
                roles[unit].append(parameter)
        return cls(
            layers=layers,
            stacks=[range(end - len(stack.blocks), end) for stack, end in zip(stacks, ends, strict=True)],
            paths=[stack.path for stack in stacks],
            embeddings=roles["embeddings"],
            lm_head=roles["lm_head"],
            rest=roles["rest"],
            block_rest=[],
            adapters=[],
            units=[
                Drawn(name, i, tuple(block.parameters()))
                for i, (name, block) in enumerate(zip(_names_of_blocks(stacks), layers, strict=True))
            ],
            tied=tied,
            by_matrices=False,
            unit_of=unit_of,
            names=names,
        )

    @classmethod
    def of_run(cls, model: nn.Module, config: LisaConfig) -> LayerStack:
        """The same with the units that ``config`` draws.

        Raises:
            ModelError: See :meth:`from_model`, no block has a matrix, or the model lacks the adapters of ``lisa.adapters``.
        """
        stack = cls.from_model(model, config.layers_path)
        stack = stack if config.adapters is None else stack.beside_adapters(model)
        return stack if config.unit == "block" else stack.by_matrix(with_block=config.block_rest == "with_block")

    def beside_adapters(self, model: nn.Module) -> LayerStack:
        """The same with the parameters of PEFT's adapters as the role ``adapters``, and not in the units.

        Raises:
            ModelError: There are none.
        """
        found = {id(parameter): parameter for parameter in _of_adapters(model)}
        if not found:
            raise ModelError(
                f"lisa.adapters: {type(model).__name__} has none; build them before the engine and the optimizer: "
                "model = lisa_ds.add_adapters(model, lisa_config)"
            )
        units = [
            replace(unit, parameters=tuple(p for p in unit.parameters if id(p) not in found)) for unit in self.units
        ]
        unit_of: dict[int, Unit] = {**self.unit_of, **dict.fromkeys(found, "adapters")}

        def without(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
            return [parameter for parameter in parameters if id(parameter) not in found]

        return replace(
            self,
            units=units,
            adapters=list(found.values()),
            unit_of=unit_of,
            embeddings=without(self.embeddings),
            lm_head=without(self.lm_head),
            rest=without(self.rest),
        )

    def by_matrix(self, *, with_block: bool) -> LayerStack:
        """The same with matrices as units; see :func:`lisa_ds.units.matrices`.

        Args:
            with_block: Whether small parameters are units as well, one of each block, and not the role ``block_rest``.

        Raises:
            ModelError: No block has a matrix.
        """
        apart = {id(parameter) for parameter in self.adapters}
        units, small = matrices(self.layers, [unit.name for unit in self.units], apart)
        if not units:
            raise ModelError("lisa.unit: 'matrix': no block has a parameter of two dimensions or more; use 'block'")
        unit_of: dict[int, Unit] = {key: unit for key, unit in self.unit_of.items() if isinstance(unit, str)}
        left = [] if with_block else [parameter for unit in small for parameter in unit.parameters]
        units += small if with_block else []
        unit_of |= {**dict.fromkeys(map(id, left), "block_rest"), **assigned(units)}
        return replace(self, units=units, block_rest=left, by_matrices=True, unit_of=unit_of)

    def parameters(self, unit: Unit) -> list[nn.Parameter]:
        """Return the parameters of what is drawn, by its index, or of a role."""
        if isinstance(unit, int):
            return list(self.units[unit].parameters)
        parameters: list[nn.Parameter] = getattr(self, unit)
        return parameters

    def numels(self, *, trainable: bool | None = None) -> dict[Unit, tuple[int, ...]]:
        """Return the elements of each parameter of each unit, whole also where ZeRO-3 has partitioned it.

        Args:
            trainable: Only parameters that require grad now (True) or do not (False); None for all.
        """
        return {
            unit: tuple(numel(p) for p in self.parameters(unit) if trainable in (None, p.requires_grad))
            for unit in self.all_units
        }

    def told(self, units: Sequence[int]) -> str:
        """Some of what is drawn, for a message: layers by index, matrices by name."""
        if not self.by_matrices:
            return f"layers {list(units)}"
        names = ", ".join(self.units[unit].name for unit in list(units)[:2])
        return f"{len(units)} matrices ({names}{', ...' if len(units) > 2 else ''})"

    @property
    def all_units(self) -> list[Unit]:
        """Every unit: those that are drawn, by index, and the roles."""
        return [*range(len(self.units)), *ROLES]

    def __repr__(self) -> str:
        """Say what was found in one line; the blocks themselves would fill pages."""
        where = ", ".join(f"{path} ({len(indices)})" for path, indices in zip(self.paths, self.stacks, strict=True))
        return f"LayerStack({where}; {'tied' if self.tied else 'untied'})"


def _of_adapters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of PEFT's adapters; told by what its layers have, so that PEFT need not be installed."""
    layers: list[Any] = [
        module for module in model.modules() if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")
    ]
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names if hasattr(layer, name)]
    return [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]


@dataclass(frozen=True, eq=False)
class _Container:
    """A module that holds blocks."""

    path: str
    blocks: list[nn.Module]

    @property
    def size(self) -> int:
        return sum(numel(parameter) for block in self.blocks for parameter in block.parameters())

    def __str__(self) -> str:
        kinds = dict.fromkeys(type(block).__name__ for block in self.blocks)
        return f"{self.path} ({len(self.blocks)} x {'/'.join(kinds)})"


def _names_of_blocks(stacks: list[_Container]) -> list[str]:
    return [f"{stack.path}.{i}" for stack in stacks for i in range(len(stack.blocks))]


def _blocks_in(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that ``module`` itself contains; none if it is no container of blocks."""
    if isinstance(module, nn.ModuleList):
        blocks = list(module)
    elif isinstance(module, nn.ModuleDict) and all(key.isdigit() for key in module):
        blocks = list(module.values())
    elif isinstance(module, nn.Sequential):
        # Embedding and head may stand in the same sequence: the blocks are the longest run of one kind.
        runs = [list(run) for _, run in groupby(module, key=type)]
        blocks = max(runs, key=len, default=[])
        blocks = blocks if len(blocks) > 1 else []
    else:
        blocks = []
    has_weights = any(True for block in blocks for _ in block.parameters())
    return blocks if has_weights and not all(isinstance(block, nn.Embedding) for block in blocks) else []


def _containers(model: nn.Module) -> dict[str, _Container]:
    """Return the containers that lie in no block of another one, by path."""
    found = {path or ".": _blocks_in(module) for path, module in model.named_modules()}
    found = {path: blocks for path, blocks in found.items() if blocks}
    inside = {id(part) for blocks in found.values() for block in blocks for part in block.modules()}
    return {
        path: _Container(path, blocks)
        for path, blocks in found.items()
        if id(model if path == "." else model.get_submodule(path)) not in inside
    }


def _detect(model: nn.Module, found: dict[str, _Container]) -> list[_Container]:
    """Choose the stack of blocks, or an encoder's and a decoder's together, among all containers."""
    twins = {path: found.get(path.replace("encoder", "decoder"), stack) for path, stack in found.items()}
    decoders = [twin for path, twin in twins.items() if twin.path != path]
    choices = [list(dict.fromkeys((found[path], twins[path]))) for path in found if found[path] not in decoders]
    if not choices:
        raise ModelError(
            f"{type(model).__name__} has no stack of blocks: LISA samples the elements of an nn.ModuleList or "
            "nn.Sequential, and there is none with parameters; wrap the blocks of the model in one"
        )

    def size(choice: list[_Container]) -> int:
        return sum(stack.size for stack in choice)

    choices.sort(key=size, reverse=True)
    choices = [choice for choice in choices if size(choice) >= _RIVAL_SHARE * size(choices[0])]
    config = getattr(model, "config", None)
    words = _call(model, "get_input_embeddings")
    if words is not None and not getattr(config, "is_encoder_decoder", False):
        # Of a vision tower and a language model, the one that stands beside the word embeddings.
        home = next((path for path, module in model.named_modules() if module is words), "")
        near = [max(_shared_depth(home, stack.path) for stack in choice) for choice in choices]
        choices = [choice for choice, depth in zip(choices, near, strict=True) if depth == max(near)]
    best = choices[0]
    if rivals := [choice for choice in choices if size(choice) > _CLEAR_SHARE * size(best)][1:]:
        several = [stack for choice in (best, *rivals) for stack in choice]
        raise ModelError(
            f"more than one stack of blocks could be meant: {', '.join(map(str, several))}; set layers_path to one of "
            f"them, or to several as '{several[0].path},{several[1].path}'"
        )
    repeats = getattr(config, "num_hidden_layers", None)
    if isinstance(repeats, int) and repeats > 1 and [len(stack.blocks) for stack in best] == [1]:
        raise ModelError(
            f"{best[0]} is one block that the model runs {repeats} times: its parameters are shared between layers, "
            "so there is nothing to sample; set layers_path to it to train it all the same"
        )
    return best


def _shared_depth(path: str, other: str) -> int:
    pairs = zip(path.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _resolve(model: nn.Module, found: dict[str, _Container], layers_path: str) -> list[_Container]:
    """Follow an explicit ``layers_path``, also when it begins with another tool's name for the model itself."""
    stacks = [_follow(model, found, path.strip()) for path in layers_path.split(",")]
    for i, stack in enumerate(stacks):
        if stack.path in (other.path for other in stacks[:i]):
            raise ModelError(f"layers_path: {layers_path!r} names {stack.path} twice")
    return stacks


def _follow(model: nn.Module, found: dict[str, _Container], path: str) -> _Container:
    try:
        module = model if path == "." else model.get_submodule(path or "?")
    except AttributeError:
        matches = [name for name in found if name.endswith(f".{path}") or _is_rooted(path, name)]
        if len(matches) == 1:
            return found[matches[0]]
        problem = "leads nowhere" if not matches else f"fits {' and '.join(matches)}"
    else:
        # PEFT's wrappers answer for what they wrap: the path that is shown is the real one.
        real = next((name for name, part in model.named_modules() if part is module), path) or "."
        if blocks := _blocks_in(module):
            return _Container(real, blocks)
        problem = f"leads to {type(module).__name__}, which is no list of blocks"
    near = [name for name in found if path and (name.startswith(f"{path}.") or path.startswith(f"{name}."))]
    near = near or difflib.get_close_matches(path, found, n=2, cutoff=0.5)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    known = ", ".join(map(str, list(found.values())[:8])) or "none"
    raise ModelError(f"layers_path: {path!r} {problem} in {type(model).__name__}{meant}; its stacks of blocks: {known}")


def _is_rooted(path: str, name: str) -> bool:
    """Whether ``path`` is ``name`` behind a prefix that other tools put before it, as in ``model.model.layers``."""
    return path.endswith(f".{name}") and set(path[: -len(name) - 1].split(".")) <= _ROOT_NAMES


def _assign(model: nn.Module, layers: list[nn.Module], names: dict[int, str]) -> tuple[dict[int, Unit], bool]:
    """Give every parameter its unit, and say whether the head is tied."""
    unit_of: dict[int, Unit] = {}
    for index, block in enumerate(layers):
        for parameter in block.parameters():
            if (other := unit_of.setdefault(id(parameter), index)) != index:
                raise ModelError(
                    f"{names[id(parameter)]} is shared by blocks {other} and {index}: "
                    "one cannot train while the other is frozen, so LISA cannot sample them"
                )
    inside = {id(part) for block in layers for part in block.modules()}
    outside = {path: module for path, module in model.named_modules() if id(module) not in inside}
    lookups: list[nn.Module] = [module for module in outside.values() if isinstance(module, nn.Embedding)]
    lookups += [words] if (words := _call(model, "get_input_embeddings")) is not None else []
    embeddings = {id(parameter) for module in lookups for parameter in module.parameters()}
    lookup_parts = {id(part) for module in lookups for part in module.modules()}
    others = {path: module for path, module in outside.items() if id(module) not in lookup_parts}
    tied_to = [m for m in others.values() if any(id(p) in embeddings for p in m.parameters(recurse=False))]
    heads = [head] if (head := _call(model, "get_output_embeddings")) is not None else tied_to
    heads = heads or _heads_by_name(others, inside)
    lm_head = {id(parameter) for module in heads for parameter in module.parameters()}
    for path, module in outside.items():
        for key, parameter in module.named_parameters(recurse=False):
            known = unit_of.get(id(parameter))
            if isinstance(known, int):
                raise ModelError(
                    f"{names[id(parameter)]} is shared by block {known} and {path or type(module).__name__} ({key}): "
                    "one cannot train while the other is frozen, so LISA cannot sample them"
                )
            role = "embeddings" if id(parameter) in embeddings else "lm_head" if id(parameter) in lm_head else "rest"
            unit_of[id(parameter)] = role
    return unit_of, bool(tied_to)


def _heads_by_name(modules: dict[str, nn.Module], inside: set[int]) -> list[nn.Module]:
    """Return the outermost modules that have the first of the usual names of a head."""
    for name in _HEAD_NAMES:
        paths = [path for path in modules if path.rpartition(".")[2] == name]
        paths = [path for path in paths if not any(id(part) in inside for part in modules[path].modules())]
        if paths:
            depth = min(path.count(".") for path in paths)
            return [modules[path] for path in paths if path.count(".") == depth]
    return []


def _call(model: nn.Module, accessor: str) -> nn.Module | None:
    """Call an accessor of a transformers model, such as ``get_input_embeddings``; ``None`` if it has no answer."""
    try:
        answer: Any = getattr(model, accessor, lambda: None)()
    except (NotImplementedError, AttributeError):
        return None
    return answer if isinstance(answer, nn.Module) else None
