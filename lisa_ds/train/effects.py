"""Finds keys of ``training`` that have no effect in this run; they are reported once, not silently ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lisa_ds.config.training import ADAMW, WITHOUT_BETAS

_DDP = "it is an option of DDP, and ZeRO-3 is at work instead"
_METRICS = "a run measures the loss of its held-out data, and nothing that is computed from logits"


def _set(key: str, *off: Any) -> Callable[[Mapping[str, Any]], bool]:
    """Whether ``key`` is given, and not as one of ``off``, nor as false or nothing."""
    return lambda given: bool(given.get(key)) and given[key] not in off


def _is(key: str, value: str, default: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda given: given.get(key, default) == value


def _reports_to(*trackers: str) -> Callable[[Mapping[str, Any]], bool]:
    def reports(given: Mapping[str, Any]) -> bool:
        asked = given.get("report_to") or "none"
        asked = {asked} if isinstance(asked, str) else set(asked)
        return bool(asked - {"none"}) if not trackers else bool(asked & {"all", *trackers})

    return reports


def _never(given: Mapping[str, Any]) -> bool:
    return False


def _chooses_best(given: Mapping[str, Any]) -> bool:
    plateau = given.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    stops = "early_stopping_patience" in given
    return bool(given.get("load_best_model_at_end")) or given.get("save_strategy") == "best" or plateau or stops


def _evaluates(given: Mapping[str, Any]) -> bool:
    return given.get("eval_strategy", "no") != "no" or "early_stopping_patience" in given


def _checkpoints(given: Mapping[str, Any]) -> bool:
    return bool(given.get("gradient_checkpointing") or given.get("activation_checkpointing"))


_compiles = _set("torch_compile")
_pushes = _set("push_to_hub")
_loads_apart = _set("dataloader_num_workers", 0)

# Key -> whether it does something, given all others, and what it would take.
_EFFECTIVE: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), (_never, _DDP)
    ),
    **dict.fromkeys(
        (
            *("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object"),
            *("eval_accumulation_steps", "prediction_loss_only"),
        ),
        (_never, _METRICS),
    ),
    "remove_unused_columns": (_never, "rows have only what the model takes"),
    **dict.fromkeys(
        (
            *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
        ),
        (_pushes, "it takes push_to_hub: true"),
    ),
    "run_name": (_reports_to(), "it takes a tracker, report_to"),
    "project": (_reports_to("trackio", "swanlab"), "it takes report_to: trackio"),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        (_reports_to("trackio"), "it takes report_to: trackio"),
    ),
    "logging_steps": (_is("logging_strategy", "steps", "steps"), "it takes logging_strategy: steps"),
    "save_steps": (_is("save_strategy", "steps", "steps"), "it takes save_strategy: steps"),
    **dict.fromkeys(
        ("save_total_limit", "save_only_model", "save_on_each_node"),
        (lambda given: given.get("save_strategy") != "no", "nothing is saved on the way with save_strategy: no"),
    ),
    "eval_steps": (
        lambda given: given.get("eval_strategy", "epoch" if _evaluates(given) else "no") == "steps" or "early_stopping_patience" in given,
        "it takes eval_strategy: steps",
    ),
    "eval_delay": (_evaluates, "it takes an eval_strategy"),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"), (_chooses_best, "it takes load_best_model_at_end or save_strategy: best")
    ),
    "early_stopping_threshold": (lambda given: "early_stopping_patience" in given, "it takes early_stopping_patience"),
    "num_train_epochs": (lambda given: given.get("max_steps", -1) <= 0, "max_steps says how long the run is"),
    "warmup_steps": (
        lambda given: given.get("lr_scheduler_type", "linear") not in ("constant", "reduce_lr_on_plateau", "greedy"),
        "this lr_scheduler_type has no warm-up; constant_with_warmup has",
    ),
    "liger_kernel_config": (_set("use_liger_kernel"), "it takes use_liger_kernel: true"),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        (_checkpoints, "it takes gradient_checkpointing: true"),
    ),
    "length_column_name": (_never, "rows have no column of lengths; train_sampling_strategy: group_by_length measures them"),
    **dict.fromkeys(
        ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"),
        (_loads_apart, "it takes dataloader_num_workers"),
    ),
    "optim_args": (_set("optim", *ADAMW), "torch's AdamW takes its settings from adam_beta1 and the like"),
    "optim_target_modules": (_never, "it is for optimizers that do not work under ZeRO-3"),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        (
            lambda given: given.get("optim", ADAMW[0]) not in WITHOUT_BETAS,
            "the optimizer that optim names has no such setting",
        ),
    ),
}  # fmt: skip
_NEED_HELD_OUT = ("per_device_eval_batch_size",)


def without(
    given: Mapping[str, Any], defaults: Mapping[str, Any], *, holds_out: bool, sharded: bool = True
) -> list[tuple[str, str]]:
    """The keys that have no effect in this run, and why, in the order in which they were written.

    Args:
        given: The ``training`` section.
        defaults: Transformers' own values; a key that has its default is not reported.
        holds_out: Whether the run has held-out data.
        sharded: Whether it runs under ZeRO, and not DDP.
    """
    found = []
    for key, value in given.items():
        if value is None or (key in defaults and value == defaults[key]):
            continue
        effective, why = _EFFECTIVE.get(key, (None, ""))
        if why == _DDP and not sharded:
            continue
        if effective is not None and not effective(given):
            found.append((key, why))
        elif key in _NEED_HELD_OUT and not holds_out:
            found.append((key, "there is no held-out data"))
    return found
