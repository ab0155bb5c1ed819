"""The ``lora`` section: low-rank adapters beside frozen weights (Hu et al., arXiv:2106.09685), by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from lisa_ds.config.base import Origin, PathName, Section, mistake, validate
from lisa_ds.config.files import read_mapping
from lisa_ds.config.targets import ALL_LINEAR, Targets, checked

ADAPTER_CONFIG = "adapter_config.json"
"""The file of a saved adapter's settings, by which its directory is known."""


class LoraConfig(Section):
    """Which adapters train."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank r of the update of each matrix."""

    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The update is multiplied by alpha / r (rsLoRA: by alpha / sqrt(r)); ``null`` for 2 r."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of what goes into an adapter, in training."""

    targets: Annotated[Targets, BeforeValidator(checked)] = ALL_LINEAR
    """Which linears have adapters: ``all-linear`` (all but the head), names that a module's path ends with
    (``[q_proj, v_proj]``), or one regular expression for whole paths."""

    rslora: bool = False
    """Scale by alpha / sqrt(r), which is stable at large ranks (Kalajdzievski, arXiv:2312.03732)."""

    dora: bool = False
    """Train a magnitude for each output beside the direction (Liu et al., arXiv:2402.09353)."""

    adapter: PathName | None = None
    """The directory of a saved adapter to go on training, instead of a new one; its own settings hold, and none of these may be
    given with it."""

    @model_validator(mode="after")
    def _saved_or_new(self) -> LoraConfig:
        given = sorted(self.model_fields_set - {"adapter"})
        if self.adapter is not None and given:
            raise mistake(f"adapter has settings of its own, in its adapter_config.json: leave out {', '.join(given)}")
        return self

    @model_serializer(mode="wrap")
    def _readable_again(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All keys; with a saved adapter that key alone, beside which no other may be given."""
        return serialise(self) if self.adapter is None else {"adapter": self.adapter}

    def effective(self) -> LoraConfig:
        """These settings, or those of the saved adapter that is gone on with.

        Raises:
            ConfigError: Its ``adapter_config.json`` is missing or malformed.
        """
        if self.adapter is None:
            return self
        file = Path(self.adapter).expanduser() / ADAPTER_CONFIG
        saved = read_mapping(file)
        fields = {
            "rank": saved.get("r"),
            "alpha": float(saved.get("lora_alpha") or 0),
            "dropout": float(saved.get("lora_dropout") or 0),
            "targets": saved.get("target_modules"),
            "rslora": bool(saved.get("use_rslora")),
            "dora": bool(saved.get("use_dora")),
        }
        return validate(LoraConfig, fields, Origin(str(file)))

    @property
    def scale_numerator(self) -> float:
        """The alpha that PEFT is given."""
        return 2.0 * self.rank if self.alpha is None else self.alpha
