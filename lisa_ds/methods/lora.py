"""LoRA, by PEFT, under stock ZeRO-3 or ZeRO-2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from lisa_ds.checkpoint import adapters as saved_adapters
from lisa_ds.config import RunConfig
from lisa_ds.config.deepspeed import section
from lisa_ds.config.lora import ADAPTER_CONFIG
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.integrations import adapters
from lisa_ds.methods.base import Method
from lisa_ds.models import skeleton
from lisa_ds.models.linears import linears


class Lora(Method):
    """Adapters train, in the model's type with an fp32 master copy; the weights beside them are frozen."""

    name = "lora"
    exports_adapter = True

    def check(self, config: RunConfig, model: Any) -> None:
        """See the base class: PEFT is missing, no linear is meant, or a saved adapter is not there, damaged or incomplete."""
        if find_spec("peft") is None:
            raise ConfigError(f"{config.where('method')}: 'lora' needs PEFT; pip install 'lisa-ds[peft]'")
        if config.tensor_parallel() != 1:
            raise ConfigError(
                f"{config.deepspeed_source()}: tensor_parallel.autotp_size: AutoTP splits linears and knows no adapters; use method "
                "'lisa' or 'full', or remove it"
            )
        saved = config.lora.adapter
        if saved is None:
            linears(config, model, inside=False, conv1d=True)
        elif not (Path(saved).expanduser() / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{config.where('lora.adapter')}: should be the directory of a saved adapter, got {saved!r}, which has no "
                "adapter_config.json"
            )
        else:
            _check_saved(config, model, Path(saved).expanduser())
        stage = section(config.deepspeed_config(), "zero_optimization").get("stage", self.stages[0])
        if config.lora.effective().dora and stage == 3:
            key = "lora.dora" if saved is None else "lora.adapter"
            raise ConfigError(
                f"{config.where(key)}: DoRA computes with whole weights outside of their modules, of which ZeRO-3 gives a rank a "
                f"slice, got {'True' if saved is None else f'{saved!r}, which is one'}; set deepspeed.zero_optimization.stage to 2"
                + (", or dora to false" if saved is None else "")
            )

    def wrap(self, config: RunConfig, model: Any, seed: int) -> Any:
        """See the base class."""
        from peft import LoraConfig, TaskType, get_peft_model

        given = config.lora
        set_seed(seed)  # adapters are drawn on each rank by itself
        if given.adapter is not None:
            return _of_base(saved_adapters.loaded(model, Path(given.adapter).expanduser(), trains=True), config)
        paths = linears(config, model, inside=False, conv1d=True)
        task = TaskType.CAUSAL_LM if config.model.task == "causal_lm" else TaskType.SEQ_CLS
        settings = LoraConfig(
            task_type=task,
            r=given.rank,
            lora_alpha=given.scale_numerator,
            lora_dropout=given.dropout,
            target_modules=list(paths),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in paths.values()),
            use_rslora=given.rslora,
            use_dora=given.dora,
        )
        return _of_base(get_peft_model(model, settings, autocast_adapter_dtype=False), config)

    def prepare(self, trainer: Any, config: RunConfig) -> None:
        """See the base class: what the trainer saves is the adapter, not the model that is frozen beside it."""
        adapters.save_alone(trainer)


def _check_saved(config: RunConfig, model: Any, place: Path) -> None:
    named = saved_adapters.with_classes(config.model, place)
    try:
        saved_adapters.check(model if named == config.model else skeleton(named), place)
    except ModelError as error:
        raise ConfigError(f"{config.where('lora.adapter')}: {error}") from error


def _of_base(wrapped: Any, config: RunConfig) -> Any:
    """``wrapped``, whose adapter names the run's model as its base when it is saved."""
    saved = wrapped.peft_config["default"]
    saved.base_model_name_or_path, saved.revision = config.model.name_or_path, config.model.revision
    return wrapped
