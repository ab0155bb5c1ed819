"""Contradictions: where the ``training`` section and the DeepSpeed config set the same value, they must agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lisa_ds.config.base import show
from lisa_ds.errors import ConfigError

# DeepSpeed's key -> the keys of `training` that hold the same fact (two: a pair of values).
_SAME_FACT = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("max_grad_norm",),
    "bf16.enabled": ("bf16",),
    "fp16.enabled": ("fp16",),
    "optimizer.params.lr": ("learning_rate",),
    "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",),
    "optimizer.params.weight_decay": ("weight_decay",),
    "scheduler.params.warmup_max_lr": ("learning_rate",),
}


def check_contradictions(
    training: Mapping[str, Any],
    deepspeed: Mapping[str, Any],
    *,
    training_source: str = "training",
    deepspeed_source: str = "deepspeed",
    world_size: int | None = None,
) -> None:
    """Refuse a DeepSpeed config that differs from ``training`` where both may speak.

    Keys that ``training`` leaves out are not compared: pass ``TrainingArguments.to_dict()`` to have its
    defaults compared as well. ``"auto"`` agrees with everything.

    Args:
        training: The ``training`` section.
        deepspeed: The DeepSpeed config.
        training_source: What messages call the first, such as ``run.yaml: training``.
        deepspeed_source: What messages call the second, such as ``configs/zero3.json``.
        world_size: If given, ``train_batch_size`` is compared with micro-batch size x accumulation steps x ranks.

    Raises:
        ConfigError: Every contradiction, one a line.
    """
    problems = []
    for key, homes in _SAME_FACT.items():
        given = _at(deepspeed, key)
        if given in (None, "auto") or any(home not in training for home in homes):
            continue
        expected = [training[home] for home in homes]
        if not _agree(list(given) if isinstance(given, (list, tuple)) else [given], expected):
            said = ", ".join(f"{home} is {training[home]!r}" for home in homes)
            problems.append(
                f"{deepspeed_source}: {key}: contradicts {training_source}, where {said}, got {show(given)}; "
                f'write "auto" here, the value lives there'
            )
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
    total = deepspeed.get("train_batch_size")
    if world_size is not None and total not in (None, "auto") and all(key in training for key in batch):
        product = training[batch[0]] * training[batch[1]] * world_size
        if total != product:
            problems.append(
                f"{deepspeed_source}: train_batch_size: contradicts {training_source}, where {batch[0]} x {batch[1]} "
                f'on {world_size} ranks is {product}, got {show(total)}; write "auto" here'
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _at(fields: Mapping[str, Any], dotted: str) -> Any:
    value: Any = fields
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _agree(given: list[Any], expected: list[Any]) -> bool:
    # As numbers where both are: a JSON file may say "1e-4" in quotes, and 1 is 1.0.
    try:
        return [float(value) for value in given] == [float(value) for value in expected]
    except (TypeError, ValueError):
        return given == expected
