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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import ROLES as ROLES
from lisa_ds.errors import ModelError
from lisa_ds.stacks import call, containers, names_of_blocks
from lisa_ds.units import Drawn, assigned, matrices, numel

Unit = int | str
"""What is sampled or frozen as a whole: a block or a matrix by its index in :attr:`LayerStack.units`, or one of :data:`ROLES`."""

# What the head is called where the model does not say (`get_output_embeddings`): the first name that occurs is it.
_HEAD_NAMES = (
    *("lm_head", "embed_out", "output_layer", "score", "classifier", "classification_head", "qa_outputs"),
    *("head", "output"),
)


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
        stacks = containers(model, layers_path)
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
                for i, (name, block) in enumerate(zip(names_of_blocks(stacks), layers, strict=True))
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
    lookups += [words] if (words := call(model, "get_input_embeddings")) is not None else []
    embeddings = {id(parameter) for module in lookups for parameter in module.parameters()}
    lookup_parts = {id(part) for module in lookups for part in module.modules()}
    others = {path: module for path, module in outside.items() if id(module) not in lookup_parts}
    tied_to = [m for m in others.values() if any(id(p) in embeddings for p in m.parameters(recurse=False))]
    heads = [head] if (head := call(model, "get_output_embeddings")) is not None else tied_to
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
