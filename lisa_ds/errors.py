"""Errors raised on purpose. Their message is complete: it is shown alone, without a traceback."""

from __future__ import annotations


class LisaError(Exception):
    """Something the user can put right. The command line prints the message and exits with code 2."""

    exit_code = 2


class ConfigError(LisaError):
    """A key or a value of a config file, two settings that contradict each other, or an option not built yet."""


class DataError(LisaError):
    """A data file is missing, empty or malformed; the message names file and line."""


class ModelError(LisaError):
    """The model has no block stack, ``layers_path`` leads nowhere, or model files are missing."""


class CheckpointError(LisaError):
    """A checkpoint is missing, truncated, or was written by another run."""


class EngineError(LisaError):
    """DeepSpeed is out of the supported range, or one of its options does not go with LISA."""


class ClusterError(LisaError):
    """Hosts or ranks do not fit together, or one of them cannot be reached; the message names it."""
