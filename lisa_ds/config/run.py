"""A whole run: model, data, method and the training arguments, in one file."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Field, model_validator

from lisa_ds.config.base import Origin, PathName, Section, fits_a_path, mistake, unfit, validate
from lisa_ds.config.deepspeed import autotp_size
from lisa_ds.config.files import read_mapping
from lisa_ds.config.galore import GaloreConfig
from lisa_ds.config.lisa import LisaConfig, rename_aliases
from lisa_ds.config.lora import LoraConfig
from lisa_ds.config.overrides import COMMAND_LINE, override
from lisa_ds.config.training import TrainingValues, known, section
from lisa_ds.errors import ConfigError

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


def _path_or_keys(value: Any) -> Any:
    if value is not None and not isinstance(value, (str, dict)):
        raise mistake("should be the path of a DeepSpeed config or its keys")
    return fits_a_path(value) if isinstance(value, str) else value


def _statistics(value: Any) -> Any:
    if isinstance(value, bool):  # what YAML makes of a bare `off` or `on`
        return "interval" if value else "off"
    if value in ("off", "interval") and isinstance(value, str):
        return value
    if not isinstance(value, int) or value < 1:
        raise mistake("should be off, interval or a number of steps, 1 or more")
    return value


class ModelConfig(Section):
    """Which model is trained."""

    name_or_path: PathName
    """``builtin:smollm2-135m``, a directory, or a name on the Hugging Face hub."""

    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """What the model is trained to do, which decides its head."""

    attn_implementation: Name | None = None
    """Passed to ``from_pretrained``: ``eager``, ``sdpa``, ``flash_attention_2``."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    revision: Name | None = None
    """Branch, tag or commit on the hub."""

    num_labels: Count | None = None
    """``sequence_classification`` only: how many classes."""

    @model_validator(mode="after")
    def _labels_belong_to_classification(self) -> ModelConfig:
        if self.num_labels is not None and self.task != "sequence_classification":
            raise mistake(f"num_labels goes with task 'sequence_classification', but task is {self.task!r}")
        return self


class DataConfig(Section):
    """What it is trained on, and how rows become tokens."""

    path: PathName
    """``builtin:stdlib-docs``, a file (json, jsonl, parquet, csv, tsv, txt), a directory of files, or a hub data set."""

    split: Name = "train"
    """The split to train on."""

    eval_path: PathName | None = None
    """Held-out data. Without it, see ``eval_split`` and ``eval_fraction``."""

    eval_split: Name | None = None
    """The split to evaluate on, of ``eval_path`` if that is given, else of ``path``."""

    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training split to hold out."""

    eval_part: Literal["all", "select", "verdict"] = "all"
    """Which held-out rows are evaluated: ``all``, or one of two halves without a row in common, ``select`` to choose settings on
    and ``verdict`` to judge them by."""

    eval_max_rows: Count | None = None
    """The most rows that are evaluated."""

    max_rows: Count | None = None
    """The most rows that are trained on."""

    format: Literal["auto", "alpaca", "messages", "prompt_completion", "text", "classification"] = "auto"
    """The format of a row; ``auto`` recognises it by its columns."""

    max_length: Count = 1024
    """The most tokens of a row."""

    packing: bool = False
    """Whether texts are joined and cut into rows of ``max_length``, for continual pre-training."""

    chat_template: Name | None = None
    """The template that conversations go through: a .jinja file, or a name; without it, the tokenizer's own."""

    loss_on: Literal["answers", "all"] = "answers"
    """Which tokens of a conversation carry loss."""

    on_too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a row longer than ``max_length``."""

    seed: int = 0
    """Seed of which rows ``eval_fraction``, ``eval_part``, ``max_rows`` and ``eval_max_rows`` choose."""

    pad_to_multiple_of: Count | None = None
    """Pads a batch's rows to a multiple of so many tokens, such as 8, instead of to the longest of them."""

    num_workers: Count = 1
    """Processes that tokenise."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns before the format is recognised: ``{question: prompt}``."""

    ignore: list[Name] = Field(default_factory=list)
    """Columns, and fields of turns, that are left out: ``[tools, reasoning_content]``."""

    @model_validator(mode="after")
    def _one_held_out_set(self) -> DataConfig:
        if self.eval_fraction and (self.eval_path or self.eval_split):
            other = "eval_path" if self.eval_path else "eval_split"
            raise mistake(f"eval_fraction and {other} both say what is held out: keep one")
        if self.eval_part != "all" and not (self.eval_fraction or self.eval_path or self.eval_split):
            raise mistake(
                f"eval_part {self.eval_part!r} is a half of the held-out rows, and there are none; set eval_fraction, eval_split or eval_path"
            )
        if self.packing and self.format not in ("auto", "text"):
            raise mistake(f"packing joins plain text, but format is {self.format!r}")
        return self


class RunConfig(Section):
    """One run. ``training`` goes to the Hugging Face training arguments, ``deepspeed`` to DeepSpeed."""

    model: ModelConfig
    """Which model is trained."""

    data: DataConfig
    """What it is trained on."""

    method: Literal["lisa", "full", "lora", "galore"] = "lisa"
    """``lisa``; ``full`` for the same run with every layer trained all the time; ``lora`` with adapters beside frozen weights;
    ``galore`` with projected gradients. Of the sections ``lisa``, ``lora`` and ``galore`` the method reads its own."""

    lisa: LisaConfig = Field(default_factory=LisaConfig)
    """Settings of method ``lisa``."""

    lora: LoraConfig = Field(default_factory=LoraConfig)
    """Settings of method ``lora``."""

    galore: GaloreConfig = Field(default_factory=GaloreConfig)
    """Settings of method ``galore``."""

    training: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of ``transformers.TrainingArguments``: learning rate, batch size, precision, steps."""

    deepspeed: Annotated[str | dict[str, Any] | None, BeforeValidator(_path_or_keys)] = None
    """DeepSpeed's config, as a path or inline. A key that DeepSpeed does not read is refused, unless it begins with ``_``, ``#``,
    ``/`` or ``$``."""

    statistics: Annotated[int | str, BeforeValidator(_statistics)] = "interval"
    """When the norms of each layer are recorded in ``layers.jsonl``: ``interval`` (at the end of each of LISA's; with another
    method every 20 steps), a number of optimizer steps, or ``off``."""

    @model_validator(mode="after")
    def _data_fits_task(self) -> RunConfig:
        classes = self.model.task == "sequence_classification"
        if classes and (self.data.packing or self.data.format not in ("auto", "classification")):
            raise mistake("model.task is 'sequence_classification': data.format must be classification, unpacked")
        if not classes and self.data.format == "classification":
            raise mistake(f"data.format is 'classification', but model.task is {self.model.task!r}")
        if "deepspeed" in self.training:
            raise mistake("training.deepspeed: DeepSpeed's config has a section of its own, deepspeed")
        return self

    def output_dir(self) -> Path:
        """Where the run writes: ``training.output_dir``, or ``runs/`` and the name of its config file."""
        given = self.training_values().output_dir
        return Path(os.path.expanduser(given)) if given else Path("runs") / (Path(self.source).stem or "run")

    def training_values(self) -> TrainingValues:
        """What of ``training`` is read without transformers.

        Raises:
            ConfigError: Every unknown key of ``training``, and every value that is read and is not what its key means, one a line.
        """
        origin = replace(self._origin, prefix="training")
        read = {field.name for field in fields(TrainingValues)}
        kind = known()
        if kind is None:  # transformers is not installed: it can be planned all the same
            given = {key: value for key, value in self.training.items() if key in read}
            kind = section(get_type_hints(TrainingValues))
        else:
            given = self.training
        values = validate(kind, given, origin).model_dump(include=read, exclude_unset=True)
        return TrainingValues(**values)

    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's keys and values, read from their file if a path is given; empty if there are none.

        Raises:
            ConfigError: The file is missing or malformed.
        """
        if isinstance(self.deepspeed, str):
            fields, origin = read_mapping(self.deepspeed), Origin(self.deepspeed)
        else:
            fields, origin = dict(self.deepspeed or {}), replace(self._origin, prefix="deepspeed")
        if problems := unfit(fields, origin, text_keys=True):
            raise ConfigError("\n".join(problems))
        return fields

    def written_out(self, *, defaults: bool = True) -> dict[str, Any]:
        """Everything as plain values, with DeepSpeed's keys in place of the path of their file.

        Args:
            defaults: Whether values that are the default are among them.

        Raises:
            ConfigError: That file is missing or malformed.
        """
        values = self.model_dump(mode="json", exclude_defaults=not defaults)
        return {**values, "deepspeed": self.deepspeed and self.deepspeed_config()}

    def deepspeed_source(self) -> str:
        """What messages call DeepSpeed's config: its own file, or the section of this one."""
        return self.deepspeed if isinstance(self.deepspeed, str) else self.where("deepspeed")

    def tensor_parallel(self, num_ranks: int | None = None) -> int:
        """Ranks that share each layer.

        Args:
            num_ranks: All ranks, where their number is known.

        Raises:
            ConfigError: It is no number of ranks, or does not divide them.
        """
        return autotp_size(self.deepspeed_config(), self.deepspeed_source(), num_ranks=num_ranks)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), more: Mapping[str, Sequence[str]] | None = None
) -> RunConfig:
    """Read a run from a YAML or JSON file.

    Args:
        path: The file.
        overrides: ``key=value`` with a dotted key, such as ``training.learning_rate=1e-4``; values are YAML. Messages call
            their place ``command line``.
        more: Overrides that go over these, by what messages call their place.

    Raises:
        ConfigError: Every mistake in the file and the overrides, one a line.
    """
    problems: list[str] = []
    fields = {key: value for key, value in read_mapping(path).items() if value is not None}  # `lisa:` alone is empty
    if isinstance(fields.get("lisa"), Mapping):
        fields["lisa"] = rename_aliases(fields["lisa"], Origin(str(path), "lisa"), problems)
    return _overridden(fields, {COMMAND_LINE: overrides, **(more or {})}, Origin(str(path)), problems)


def model_alone(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run for the planner, from a model's name alone: 16-bit, one row of 1,024 tokens at a time, no data.

    Args:
        name: Of the model, as ``model.name_or_path``.
        overrides: As for :func:`load_config`.

    Raises:
        ConfigError: Every mistake in the overrides, one a line.
    """
    fields = {
        "model": {"name_or_path": name},
        "data": {"path": "none", "max_length": 1024},
        "training": {"bf16": True, "per_device_train_batch_size": 1},
    }
    return _overridden(fields, {COMMAND_LINE: overrides}, Origin(COMMAND_LINE), [])


def from_fields(fields: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that keys describe which were read elsewhere than in its file, such as in its records.

    Args:
        fields: Its sections.
        source: What messages call the place where they were read.
        overrides: As for :func:`load_config`.

    Raises:
        ConfigError: Every mistake in fields and overrides, one a line.
    """
    return _overridden(copy.deepcopy(dict(fields)), {COMMAND_LINE: overrides}, Origin(source), [])


def _overridden(
    fields: dict[str, Any], overrides: Mapping[str, Sequence[str]], origin: Origin, problems: list[str]
) -> RunConfig:
    return validate(RunConfig, fields, override(fields, overrides, origin, problems), problems)
