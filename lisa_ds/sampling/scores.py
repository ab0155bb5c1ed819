"""Files of scores: what ``lisa-ds profile`` writes and ``sampler: {name: fixed_scores}`` reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lisa_ds.errors import DataError

_FORMAT = "lisa_ds.layer_scores/1"


@dataclass(frozen=True)
class LayerScores:
    """How much each block of a model matters, by some measure."""

    score: str
    """The measure: ``grad_norm/accumulated``."""

    scores: tuple[float, ...]
    """Score of each block: finite and not negative."""

    model: str = ""
    """The model that was measured."""

    settings: dict[str, Any] = field(default_factory=dict)
    """What it was measured on: data, batches, ranks."""

    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write the file; it appears whole or not at all.

        Raises:
            DataError: It cannot be written.
        """
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n")
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            raise DataError(f"{path}: cannot be written: {error.strerror}") from None

    @classmethod
    def read(cls, path: str | Path) -> LayerScores:
        """Read a file of scores.

        Raises:
            DataError: It is missing, or not a file of scores.
        """
        path = Path(path).expanduser()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; `lisa-ds profile` writes such a file") from None
        except ValueError as error:
            raise DataError(f"{path}: is not JSON, or truncated: {error}") from None
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise DataError(f"{path}: is not a file of scores ({_FORMAT}); `lisa-ds profile` writes one")
        try:
            found = cls(**{**values, "scores": tuple(values["scores"])})
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: is not a whole file of scores: {error}") from None
        if not found.scores or not all(_is_score(score) for score in found.scores):
            raise DataError(f"{path}: scores should be finite numbers, none negative, got {list(found.scores)}")
        return found


def ratios(lora: Sequence[float], full: Sequence[float]) -> tuple[float, ...]:
    """The LISA paper's ratios: mean weight norms of a LoRA run over those of full fine-tuning.

    They are not scaled to a number of layers yet, and exceed 1 where LoRA moved a layer further than full fine-tuning.

    Args:
        lora: The mean weight norm of each block over a LoRA run.
        full: The same over a full fine-tuning run.

    Raises:
        ValueError: Their numbers differ, or a norm is not positive.
    """
    if len(lora) != len(full) or not all(_is_score(norm) for norm in lora) or not all(norm > 0 for norm in full):
        raise ValueError(
            f"ratios: norms should be positive and of equally many layers, got {list(lora)} and {list(full)}"
        )
    return tuple(first / second for first, second in zip(lora, full, strict=True))


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
