"""All checks of a run before its data is read: when it is refused, nothing has been loaded or written."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from lisa_ds import methods
from lisa_ds.config import RunConfig
from lisa_ds.errors import ConfigError
from lisa_ds.integrations import hf
from lisa_ds.models import check_weights, fitting_skeleton
from lisa_ds.train import arguments, effects, fit, packages
from lisa_ds.train.preflight import check_memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A run that has passed all checks that need no data."""

    given: dict[str, Any]
    """Its ``training`` section, under the names of the installed transformers."""

    model: Any
    """Its model without weights."""

    planned: str | None
    """Its plan in a line, where the planner knows the architecture."""


def check(config: RunConfig, *, force: bool = False) -> Checked:
    """Check a run against the libraries that read it, its method against its model, and its size against the device.

    Args:
        config: The run.
        force: Whether to try a run that the planner says cannot fit.

    Raises:
        LisaError: Names file, key and value, and what to change.
    """
    given = arguments.check(config)
    origin = arguments.origin(config)
    packages.check(given, origin)
    if (deepspeed := arguments.deepspeed_config(config)) is not None:
        hf.check_deepspeed(deepspeed, config.where("deepspeed"), lisa=config.method == "lisa")
    if given.get("fp16"):
        hf.check_fp16(config.where("training.fp16"))
    model = fitting_skeleton(config.model)
    packages.check(given, origin, model_type=getattr(model.config, "model_type", None))
    if not getattr(model, "supports_gradient_checkpointing", True):
        for key in ("gradient_checkpointing", "activation_checkpointing"):
            if given.get(key):
                raise ConfigError(
                    f"{origin.where(key)}: {type(model).__name__} does not support it, got True; set it to false"
                )
    methods.of(config).check(config, model)
    fit.check_length(config, model)
    planned = check_memory(config, force=force)
    check_weights(config.model)
    check_writable(config)
    if os.environ.get("RANK", "0") == "0":
        sharded = deepspeed is not None
        for key, why in effects.without(
            given, arguments.defaults(), holds_out=arguments.holds_out(config), sharded=sharded
        ):
            written = key if key in config.training else key.replace("activation", "gradient")
            _log.warning("%s: has no effect in this run: %s", origin.where(written), why)
    return Checked(given, model, planned)


def check_writable(config: RunConfig) -> None:
    """Refuse an output directory that cannot be made or written to; the trainer would fail only once a model is loaded.

    Raises:
        ConfigError: It cannot.
    """
    output_dir = arguments.output_dir(config)
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if os.path.exists(path))
    where = config.where("training.output_dir")
    if not place.is_dir():
        raise ConfigError(f"{where}: {output_dir} cannot be made: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{where}: {output_dir} cannot be written to")
    longest = os.pathconf(place, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in output_dir.parts):
        raise ConfigError(f"{where}: {output_dir} cannot be made: names have at most {longest} bytes there")
