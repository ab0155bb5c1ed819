"""The cases of trajectories: each option alone, every pair of options together, on odd numbers of ranks and in 16 bits."""

from __future__ import annotations

from typing import Any

from tests.zero3 import pairwise
from tests.zero3.trajectory import Case

NEVER = {"embeddings": "never"}
EVERY = {"embeddings": {"every": 2}, "lm_head": {"every": 3}}
SAMPLED = {"embeddings": "sampled", "lm_head": "sampled", "seed": 4}
POLICIES = [
    Case("roles_every", lisa=EVERY),
    Case("roles_every_reentrant", lisa=EVERY, checkpointing="reentrant"),
    Case("roles_every_non_reentrant", lisa=EVERY, checkpointing="non_reentrant"),
    Case("roles_every_offload", lisa=EVERY, offload=True, accumulation=2),
    Case("roles_every_prefetch", lisa=EVERY, prefetch=True),
    Case("roles_sampled", lisa=SAMPLED),
    Case(
        "roles_sampled_tied_reentrant", lisa={"embeddings": "sampled", "seed": 4}, tied=True, checkpointing="reentrant"
    ),
    Case("roles_sampled_zero_init", lisa=SAMPLED, zero_init=True, checkpointing="non_reentrant"),
    Case("roles_sampled_given_optimizer", lisa={**SAMPLED, "optimizer": "adamw"}),
]
# Intervals of 3 steps: a block that is kept rises on.
REWARM, LIMIT = {"rewarm_steps": 5}, {"norm_growth_limit": 1.02}
CAREFUL = [
    Case("rewarm", lisa=REWARM),
    Case("rewarm_given_optimizer", lisa={**EVERY, **REWARM, "optimizer": "adamw"}),
    Case("limit", lisa=LIMIT, fresh=True),
    Case("limit_given_optimizer", lisa={**LIMIT, "optimizer": "adamw"}, fresh=True),
    Case("limit_offload", lisa=LIMIT, fresh=True, offload=True, accumulation=2),
    Case("limit_given_optimizer_offload", lisa={**LIMIT, "optimizer": "adamw"}, fresh=True, offload=True),
    Case(
        "with_all_care",
        lisa={**EVERY, **REWARM, **LIMIT, "embeddings_lr_scale": 0.5},
        fresh=True,
        accumulation=2,
        scheduler=True,
        checkpointing="reentrant",
    ),
]
EXACT = [
    Case("plain"),
    Case("accumulation", accumulation=2),
    Case("no_clip", clip=0.0),
    Case("scheduler", scheduler=True),
    Case("reentrant", checkpointing="reentrant"),
    Case("non_reentrant", checkpointing="non_reentrant"),
    Case("tied", tied=True),
    Case("frozen_embeddings", lisa=NEVER),
    Case("frozen_embeddings_reentrant", lisa=NEVER, checkpointing="reentrant"),
    Case("frozen_embeddings_non_reentrant", lisa=NEVER, checkpointing="non_reentrant"),
    Case("only_blocks", lisa={"embeddings": "never", "lm_head": "never", "rest": "never"}, checkpointing="reentrant"),
    Case("cpu_offload", offload=True),
    Case("cpu_offload_accumulation", offload=True, accumulation=2),
    Case("cpu_offload_of_weights", offload=True, offload_param=True),
    Case("zero_init", zero_init=True),
    Case("zero_init_tied_reentrant", zero_init=True, tied=True, checkpointing="reentrant"),
    Case("prefetch", prefetch=True),
    Case("small_buckets", small_buckets=True),
    Case("lr_scales", lisa={"embeddings_lr_scale": 0.1, "lm_head_lr_scale": 0.5, "rest_lr_scale": 2.0}),
    Case("direct_backward", checkpointing="non_reentrant", direct_backward=True),
    Case("bernoulli", num_sampled=1, lisa={"sampler": "bernoulli", "seed": 8}),
    Case("cyclic", lisa={"sampler": "cyclic"}),
    Case("given_optimizer", lisa={"optimizer": "adamw"}),
    Case("given_optimizer_offload", offload=True, accumulation=2, lisa={"optimizer": "adamw"}),
    Case("64_micro_batches", accumulation=64, steps=10),
    *POLICIES,
    *CAREFUL,
]
# Every two values of these meet in one of the cases below.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "checkpointing": [{}, {"checkpointing": "reentrant"}, {"checkpointing": "non_reentrant"}],
    "policies": [{}, {"lisa": NEVER}, {"lisa": EVERY}, {"lisa": SAMPLED}],
    "care": [{}, {"lisa": REWARM}, {"lisa": LIMIT, "fresh": True}],
    "offload": [{}, {"offload": True}, {"offload": True, "offload_param": True}],
    "optimizer": [{}, {"lisa": {"optimizer": "adamw"}}],
    "weights": [{}, {"tied": True}],
    "zero_init": [{}, {"zero_init": True}],
    "accumulation": [{}, {"accumulation": 2}],
    "prefetch": [{}, {"prefetch": True}],
    "scheduler": [{}, {"scheduler": True}],
}


def combined(number: int, chosen: dict[str, int]) -> Case:
    """A case with the values of all options that were chosen."""
    changes: dict[str, Any] = {}
    lisa: dict[str, Any] = {}
    for option, index in chosen.items():
        given = dict(OPTIONS[option][index])
        lisa |= given.pop("lisa", {})
        changes |= given
    if changes.get("tied"):
        lisa.pop("lm_head", None)  # it is the embeddings
    return Case(f"pairs_{number}", lisa=lisa, **changes)


PAIRWISE = [combined(number, chosen) for number, chosen in enumerate(pairwise.covering(OPTIONS))]
ODD = [  # also on 3 ranks
    *("plain", "accumulation", "tied", "frozen_embeddings_reentrant", "cpu_offload_accumulation"),
    *("roles_sampled", "with_all_care"),
]
SIXTEEN_BIT = [
    Case("bf16", dtype="bf16"),
    Case("bf16_accumulation_offload", dtype="bf16", accumulation=2, offload=True),
    Case("fp16_limit", dtype="fp16", overflow_at=4, fresh=True, clip=0.0, lisa={**EVERY, **REWARM, **LIMIT}),
    Case(
        "fp16_limit_given_optimizer",
        dtype="fp16",
        overflow_at=4,
        fresh=True,
        clip=0.0,
        lisa={**LIMIT, "optimizer": "adamw"},
    ),
    Case("fp16_overflow_at_boundary", dtype="fp16", overflow_at=5),
]
DROPPED = Case("dropped_update", drop_update_at=4)
