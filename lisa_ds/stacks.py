"""Finds the stack of blocks in a model: a container that holds them, or an encoder's and a decoder's together."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from torch import nn

from lisa_ds.errors import ModelError
from lisa_ds.units import numel

# How peers spell the model's own name at the start of a path: `model.model.layers` is our `model.layers`.
_ROOT_NAMES = {"model", "module", "base_model"}
# A container this much smaller than the largest is not in question (an adapter, a projector, a token predictor) ...
_RIVAL_SHARE = 0.1
# ... and one at least this much smaller than the best loses to it; nearer ones are the user's choice.
_CLEAR_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Container:
    """A module that holds blocks."""

    path: str
    blocks: list[nn.Module]

    @property
    def size(self) -> int:
        """Elements of all parameters of its blocks."""
        return sum(numel(parameter) for block in self.blocks for parameter in block.parameters())

    def __str__(self) -> str:
        """Path, number and kinds of blocks, for messages."""
        kinds = dict.fromkeys(type(block).__name__ for block in self.blocks)
        return f"{self.path} ({len(self.blocks)} x {'/'.join(kinds)})"


def containers(model: nn.Module, layers_path: str) -> list[Container]:
    """The stacks of ``model``, in the order in which their blocks run.

    Args:
        model: Any module.
        layers_path: ``auto``, or dotted paths to containers of blocks, separated by commas.

    Raises:
        ModelError: There is none, more than one could be meant, or ``layers_path`` leads to none.
    """
    found = _by_path(model)
    return _detect(model, found) if layers_path == "auto" else _resolve(model, found, layers_path)


def names_of_blocks(stacks: list[Container]) -> list[str]:
    """The path of each block of ``stacks``, in order."""
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


def _by_path(model: nn.Module) -> dict[str, Container]:
    """Return the containers that lie in no block of another one, by path."""
    found = {path or ".": _blocks_in(module) for path, module in model.named_modules()}
    found = {path: blocks for path, blocks in found.items() if blocks}
    inside = {id(part) for blocks in found.values() for block in blocks for part in block.modules()}
    return {
        path: Container(path, blocks)
        for path, blocks in found.items()
        if id(model if path == "." else model.get_submodule(path)) not in inside
    }


def _detect(model: nn.Module, found: dict[str, Container]) -> list[Container]:
    """Choose the stack of blocks, or an encoder's and a decoder's together, among all containers."""
    twins = {path: found.get(path.replace("encoder", "decoder"), stack) for path, stack in found.items()}
    decoders = [twin for path, twin in twins.items() if twin.path != path]
    choices = [list(dict.fromkeys((found[path], twins[path]))) for path in found if found[path] not in decoders]
    if not choices:
        raise ModelError(
            f"{type(model).__name__} has no stack of blocks: LISA samples the elements of an nn.ModuleList or "
            "nn.Sequential, and there is none with parameters; wrap the blocks of the model in one"
        )

    def size(choice: list[Container]) -> int:
        return sum(stack.size for stack in choice)

    choices.sort(key=size, reverse=True)
    choices = [choice for choice in choices if size(choice) >= _RIVAL_SHARE * size(choices[0])]
    config = getattr(model, "config", None)
    words = call(model, "get_input_embeddings")
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


def _resolve(model: nn.Module, found: dict[str, Container], layers_path: str) -> list[Container]:
    """Follow an explicit ``layers_path``, also when it begins with another tool's name for the model itself."""
    stacks = [_follow(model, found, path.strip()) for path in layers_path.split(",")]
    for i, stack in enumerate(stacks):
        if stack.path in (other.path for other in stacks[:i]):
            raise ModelError(f"layers_path: {layers_path!r} names {stack.path} twice")
    return stacks


def _follow(model: nn.Module, found: dict[str, Container], path: str) -> Container:
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
            return Container(real, blocks)
        problem = f"leads to {type(module).__name__}, which is no list of blocks"
    near = [name for name in found if path and (name.startswith(f"{path}.") or path.startswith(f"{name}."))]
    near = near or difflib.get_close_matches(path, found, n=2, cutoff=0.5)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    known = ", ".join(map(str, list(found.values())[:8])) or "none"
    raise ModelError(f"layers_path: {path!r} {problem} in {type(model).__name__}{meant}; its stacks of blocks: {known}")


def _is_rooted(path: str, name: str) -> bool:
    """Whether ``path`` is ``name`` behind a prefix that other tools put before it, as in ``model.model.layers``."""
    return path.endswith(f".{name}") and set(path[: -len(name) - 1].split(".")) <= _ROOT_NAMES


def call(model: nn.Module, accessor: str) -> nn.Module | None:
    """Call an accessor of a transformers model, such as ``get_input_embeddings``; ``None`` if it has no answer."""
    try:
        answer: Any = getattr(model, accessor, lambda: None)()
    except (NotImplementedError, AttributeError):
        return None
    return answer if isinstance(answer, nn.Module) else None
