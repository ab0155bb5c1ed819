"""A pytest plugin that sends DeepSpeed's own ZeRO-3 tests through ``lisa_ds.initialize``, with every block sampled.

DeepSpeed's tests run in worker processes forked from a server; it imports this module first, and importing it is what rebinds
``deepspeed.initialize``. Environment:

* ``THROUGH``: ``stock``, or what ``lisa.optimizer`` shall be: ``masked_adamw`` or ``adamw``.
* ``ENGINES``: a file to which each call for a ZeRO-3 engine adds a byte, so that tests which never ask for one can be told.
"""

from __future__ import annotations

import functools
import inspect
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from torch import nn

from lisa_ds import initialize
from lisa_ds.errors import ModelError
from lisa_ds.layers import LayerStack

_stock = deepspeed.initialize
_from_model = LayerStack.from_model


class _Listed(nn.Module):
    """A model without a list of blocks, seen as one block; the parameters stay the same ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([model])


def _stack(model: nn.Module, layers_path: str = "auto") -> LayerStack:
    try:
        return _from_model(model, layers_path)
    except ModelError:
        return _from_model(_Listed(model), "blocks")


def _initialize(*args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(_stock).bind(*args, **kwargs).arguments
    config = given.get("config") or given.get("config_params")
    config = json.loads(Path(config).read_text()) if isinstance(config, str) else config
    if config is None or config.get("zero_optimization", {}).get("stage") != 3:
        return _stock(*args, **kwargs)
    with Path(os.environ["ENGINES"]).open("a") as log:
        log.write(".")
    if os.environ["THROUGH"] == "stock":
        return _stock(*args, **kwargs)
    blocks = _stack(given["model"]).layers
    lisa: dict[str, Any] = {"num_sampled_layers": len(blocks), "optimizer": os.environ["THROUGH"]}
    train = [i for i, block in enumerate(blocks) if any(parameter.requires_grad for parameter in block.parameters())]
    if len(train) < len(blocks):
        lisa = {"sampler": {"name": "fixed", "layers": train}, "optimizer": os.environ["THROUGH"]}
    deepspeed.initialize = _stock  # which ours calls in turn
    try:
        return initialize(**given, lisa_config=lisa)
    finally:
        deepspeed.initialize = _routed


_routed = deepspeed.initialize = functools.wraps(_stock)(_initialize)
LayerStack.from_model = staticmethod(_stack)


def pytest_configure() -> None:
    """Have the server of worker processes import this module."""
    multiprocessing.set_forkserver_preload([__name__])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what says that it is of another stage."""
    kept = [item for item in items if _stage(item) in (3, None)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _stage(item: Any) -> Any:
    defaults = {name: p.default for name, p in inspect.signature(item.function).parameters.items()}
    given = {**defaults, **(item.callspec.params if hasattr(item, "callspec") else {})}
    return given.get("zero_stage", given.get("stage"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note how many ZeRO-3 engines the test asked for, and let a test that hangs fail without ending all others."""
    log = Path(os.environ["ENGINES"])
    before = log.stat().st_size
    try:
        yield
    except pytest.exit.Exception as hung:
        pytest.fail(str(hung))
    finally:
        item.user_properties.append(("engines", log.stat().st_size - before))
