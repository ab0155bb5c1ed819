"""Checks that the installed DeepSpeed, its optimizer and its options are supported, before anything is built on them.

The window (:mod:`lisa_ds.engines.zero3.optimizer.window`) lives inside Stage 3's own data structures. A DeepSpeed that renamed one
of them must stop the run with its name, not train something else; an option that keeps state of its own beside those
structures must be refused by name, not silently ignored.
"""

from __future__ import annotations

import importlib
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from packaging.version import Version

from lisa_ds.engines.zero3 import parallel
from lisa_ds.errors import EngineError
from lisa_ds.layers import LayerStack

OLDEST, NEWEST_BELOW = "0.19.5", "0.20"
"""The DeepSpeed releases this engine was tested with: ``OLDEST <= version < NEWEST_BELOW``."""

DEEPCOMPILE = "compile.deepcompile: caches gradient views that move at each switch; set it to false"

# Stage 3's map from a parameter to its slice of the gradient buffer, under its mangled name.
GRAD_PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"

# Lists with one entry for each sub-group. All but the fp32 partitions never change after partitioning.
SUB_GROUP_LISTS = (
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp16_partitioned_groups_flat_numel",
    "fp16_partitioned_groups_flat_id",
    "groups_padding",
    "sub_group_process_groups",
    "sub_group_partition_counts",
)
_STAGE3_METHODS = (
    "_clear_fp32_optimizer_param_groups",
    "_create_fp16_sub_groups",
    "_create_fp32_partitions",
    "_get_fp32_opt_state_partition",
    "_get_norm_groups",
    "_optimizer_step",
    "_overflow_clean_up",
    "_partition_all_parameters",
    "_post_step",
    "_pre_step",
    "_rigid_load_state_dict",
    "_set_fp32_optimizer_param_groups",
    "_setup_for_real_optimizer",
    "_unflatten_partitioned_parameters",
    "_update_scale",
    "create_reduce_and_remove_grad_hooks",
    "partition_grads",
    "reduce_ready_partitions_and_remove_grads",
    "reenter_backward_if_needed",
    "set_full_hp_param",
    "set_grad_positions",
    "set_local_hp_param",
    "should_refresh_expected_hook_count",
    "state_dict",
    "step",
    "unscale_and_clip_grads",
    "update_hook_state_and_maybe_run_epilogue",
)
_STAGE3_ATTRIBUTES = (
    *SUB_GROUP_LISTS,
    "_epilogue_ran_this_backward",
    "_offload_boundary_param_ids",
    "clip_grad",
    "dp_process_group",
    "fp32_partitioned_groups_flat",
    "ipg_buckets",
    "micro_step_id",
    "model_parallel_group",
    "offload_optimizer",
    "parameter_offload",
    "persistent_parameters",
    "sequence_parallel_size",
    "sub_group_to_group_id",
    "torch_autocast_gradscaler",
)
_ENGINE_METHODS = (
    "_configure_zero_optimizer",
    "_get_ckpt_name",
    "_get_zero_ckpt_name",
    "_take_model_step",
    "get_data_types",
    "zero_force_ds_cpu_optimizer",
    "zero_reduce_bucket_size",
)


def check_deepspeed() -> None:
    """Refuse a DeepSpeed outside the range this engine was tested with, or one that lacks a name it needs.

    Raises:
        EngineError: Names the version found, the range, and the missing attribute if any.
    """
    found = Version(deepspeed.__version__.split("+")[0])
    if not Version(OLDEST) <= found < Version(NEWEST_BELOW):
        raise EngineError(
            f"deepspeed {deepspeed.__version__} is installed; this engine was run with >={OLDEST},<{NEWEST_BELOW}. "
            f'Install one of those: pip install "deepspeed>={OLDEST},<{NEWEST_BELOW}"'
        )
    for owner, names in (
        (stage3.DeepSpeedZeroOptimizer_Stage3, _STAGE3_METHODS),
        (DeepSpeedEngine, _ENGINE_METHODS),
    ):
        for name in names:
            if not hasattr(owner, name):
                raise EngineError(
                    f"deepspeed {deepspeed.__version__} has no {owner.__name__}.{name}, which this engine needs. "
                    f'Install a release it was run with: pip install "deepspeed>={OLDEST},<{NEWEST_BELOW}"'
                )
    # Subclasses of Stage 3 must be defined on the real class: import them before it is rebound for a moment.
    importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")


def check_attributes(optimizer: Any) -> None:
    """Refuse a Stage 3 optimizer, after its layout and before its state, that lacks an attribute the window needs."""
    for name in _STAGE3_ATTRIBUTES:
        if not hasattr(optimizer, name):
            raise EngineError(
                f"deepspeed {deepspeed.__version__}: the ZeRO-3 optimizer has no attribute {name!r}, which this engine "
                f'needs. Install a release it was run with: pip install "deepspeed>={OLDEST},<{NEWEST_BELOW}"'
            )


def check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers that Stage 3 handles by sub-group position, or rebuilds over the first sub-groups it gets."""
    if optimizer is None:
        raise EngineError("there is no optimizer: pass one, or name one in the DeepSpeed config's 'optimizer' section")
    kind = type(optimizer).__name__
    if "Muon" in kind or "Adagrad" in kind:
        raise EngineError(
            f"optimizer: {kind} is not supported under LISA; use AdamW, or another that keeps its state by tensor"
        )


def check_options(config: Any) -> None:
    """Refuse DeepSpeed options that keep state beside Stage 3's sub-groups, each by name and with its remedy.

    Args:
        config: The parsed ``DeepSpeedConfig``.

    Raises:
        EngineError: Lists every option that cannot be combined with LISA.
    """
    if not hasattr(config, "_param_dict"):
        raise EngineError(
            f"deepspeed {deepspeed.__version__} has no {type(config).__name__}._param_dict, which this engine needs. "
            f'Install a release it was run with: pip install "deepspeed>={OLDEST},<{NEWEST_BELOW}"'
        )
    problems = zero_problems(config.zero_config) + parallel.problems(config._param_dict)
    if getattr(getattr(config, "compile_config", None), "deepcompile", False):
        problems.append(DEEPCOMPILE)
    if getattr(config, "load_universal_checkpoint", False):
        problems.append("checkpoint.load_universal: universal checkpoints drop frozen layers; resume a native one")
    if problems:
        raise EngineError("\n".join(f"deepspeed config: {problem}" for problem in problems))


def zero_problems(zero: Any) -> list[str]:
    """Options of a parsed ``zero_optimization`` section that LISA does not support: key, value and remedy of each."""
    problems = []
    if int(zero.stage) != 3:
        problems.append(
            f"zero_optimization.stage: LISA shards its state under ZeRO-3, got {int(zero.stage)}; set it to 3"
        )
    if getattr(zero, "zenflow", None) is not None:
        problems.append("zero_optimization.zenflow: keeps its own copies of the optimizer state; remove it")
    if zero.zero_quantized_nontrainable_weights:
        problems.append(
            "zero_optimization.zero_quantized_nontrainable_weights: would quantise layers that train later; set it to false"
        )
    for key, what in (("zero_quantized_weights", "weights"), ("zero_quantized_gradients", "gradients")):
        if getattr(zero, key, False):
            problems.append(
                f"zero_optimization.{key}: would round {what} on their way between ranks, by kernels for GPUs that this engine "
                "was not run with; set it to false"
            )
    offload = zero.offload_optimizer
    if _device(offload) != "none":
        if _device(offload) == "nvme":
            problems.append("zero_optimization.offload_optimizer.device: 'nvme' is not supported; use 'cpu' or 'none'")
        if getattr(offload, "super_offload", False):
            problems.append("zero_optimization.offload_optimizer.super_offload: is not supported; set it to false")
        if getattr(offload, "ratio", 1.0) != 1.0:
            problems.append(
                f"zero_optimization.offload_optimizer.ratio: must be 1.0, got {offload.ratio}: the sampled state moves "
                "as a whole"
            )
    if _device(zero.offload_param) == "nvme":
        problems.append("zero_optimization.offload_param.device: 'nvme' is not supported; use 'cpu' or 'none'")
    if int(getattr(zero, "mics_shard_size", -1)) > 0:
        problems.append(f"zero_optimization.mics_shard_size: is not supported, got {zero.mics_shard_size}; remove it")
    if getattr(zero, "elastic_checkpoint", False):
        problems.append("zero_optimization.elastic_checkpoint: is deprecated by DeepSpeed; set it to false")
    return problems


def _device(offload: Any) -> str:
    device = getattr(offload, "device", "none")
    return str(getattr(device, "value", device))  # an enum member, or after validation its bare value


def check_leaf_modules(model: Any, stack: LayerStack) -> None:
    """Refuse ZeRO-3 leaf modules that hold parameters of a block.

    A leaf module reduces a zero gradient for every parameter that got none, frozen ones included.
    """
    in_blocks = {id(parameter) for block in stack.layers for parameter in block.parameters()}
    for name, module in model.named_modules():
        if getattr(module, "_z3_leaf", False) and any(id(p) in in_blocks for p in module.parameters()):
            raise EngineError(
                f"{name} ({type(module).__name__}) is a ZeRO-3 leaf module and holds parameters of a sampled block; "
                "remove set_z3_leaf_modules (or zero_optimization.leaf_module) for it"
            )
