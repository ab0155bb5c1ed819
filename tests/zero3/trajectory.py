"""One training run told twice: by the ZeRO-3 engine on several ranks, and by plain torch in one process.

The reference knows nothing of DeepSpeed or of lisa_ds but the schedule's layers: it toggles ``requires_grad``, drops the
moments of layers that leave, and steps ``torch.optim.AdamW``. Both sides build the same model and data from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-4  # at 1e-8, near-zero gradients through Adam amplify rounding noise to the size of a step
MICRO_BATCH, SEQUENCE = 2, 16
LAYERS = 5


@dataclass(frozen=True)
class Case:
    """One configuration of a run; the defaults are the plain one."""

    name: str
    dtype: str = "fp32"
    steps: int = 10
    interval_steps: int = 3
    num_sampled: int = 2
    accumulation: int = 1
    clip: float = 0.5
    checkpointing: str = ""  # "", "reentrant", "non_reentrant"
    tied: bool = False
    zero_init: bool = False
    offload: bool = False
    offload_param: bool = False
    prefetch: bool = False
    scheduler: bool = False
    small_buckets: bool = False
    overflow_at: int | None = None
    drop_update_at: int | None = None
    direct_backward: bool = False  # loss.backward() in place of engine.backward(loss)
    width: int = 1  # times the model's usual one
    heads: int = 1  # of the model's usual width each
    fresh: bool = False  # other rows at every step, so that gradients jump
    zero: dict[str, Any] = field(default_factory=dict)  # more keys of zero_optimization
    autotp: int = 1  # ranks that share a layer
    masked: dict[str, Any] | None = None  # give a MaskedAdamW with these arguments in place of torch's AdamW
    lisa: dict[str, Any] = field(default_factory=dict)

    @property
    def lisa_config(self) -> dict[str, Any]:
        count = {} if "sampling_ratio" in self.lisa else {"num_sampled_layers": self.num_sampled}
        return {**count, "interval_steps": self.interval_steps, "seed": 7, **self.lisa}


@dataclass
class Outcome:
    """What a run left behind, comparable across the two sides."""

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, Tensor]
    layers: list[tuple[int, ...]]
    extra: dict[str, Any] = field(default_factory=dict)


def build_model(tied: bool = False, layers: int = LAYERS, width: int = 1, heads: int = 1) -> nn.Module:
    """A Llama whose parameters divide by neither 2 nor 3: biases of 37, norms of 26."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101,
        hidden_size=26 * width * heads,
        intermediate_size=37 * width * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # zeros and ones would hide mistakes in biases and norms
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.02)
    return model


def micro_batches(case: Case, world_size: int) -> Iterator[list[Tensor]]:
    """For each step, its micro-batches of all ranks: ``(world_size * MICRO_BATCH, SEQUENCE)`` each."""
    draw = torch.Generator().manual_seed(123)
    pool: list[Tensor] = []
    for _ in range(case.steps):
        if case.fresh or not pool:
            shape = (world_size * MICRO_BATCH, SEQUENCE)
            pool = [torch.randint(0, 101, shape, generator=draw) for _ in range(case.accumulation)]
        yield pool


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if (p.ds_shape if hasattr(p, "ds_shape") else p.shape)[1:]]
    vectors = [p for p in model.parameters() if not (p.ds_shape if hasattr(p, "ds_shape") else p.shape)[1:]]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def units(model: nn.Module, lisa: dict[str, Any] | None = None) -> dict[str, int | str]:
    """Parameter name to its block, matrix or role, told from names alone: independent of lisa_ds.layers."""
    result: dict[str, int | str] = {}
    lisa = lisa or {}
    plain = {n: n.replace(".base_layer", "") for n, _ in model.named_parameters()}
    linears = [n.removesuffix(".weight") for n in plain.values() if "proj.weight" in n]
    for full, name in plain.items():
        if ".lora_" in name:
            result[full] = "adapters"
        elif ".layers." in name:
            block = int(name.split(".layers.")[1].split(".")[0])
            linear = name.rpartition(".")[0]
            small = len(linears) + block if lisa.get("block_rest") == "with_block" else "block_rest"
            matrix = linears.index(linear) if linear in linears else small
            result[full] = block if lisa.get("unit", "block") == "block" else matrix
        else:
            result[full] = "embeddings" if "embed" in name else "lm_head" if "lm_head" in name else "rest"
    return result


ROLES = ("embeddings", "lm_head", "rest", "block_rest", "adapters")


def roles_in(case: Case, interval: int) -> tuple[str, ...]:
    """Roles that train in an interval, from the config's words: independent of lisa_ds.sampling."""

    def trains(role: str) -> bool:
        policy: Any = "always" if role == "adapters" else case.lisa.get(role, "always")
        if policy == "sampled":
            chance = random.Random(f"{role}/{case.lisa_config['seed']}/{interval}").random()
            return chance < case.num_sampled / LAYERS
        if isinstance(policy, dict):
            return interval in range(0, interval + 1, policy["every"])
        return bool(policy == "always")

    return tuple(
        role
        for role in ROLES
        if trains(role)
        and not (case.tied and role == "lm_head")
        and not (role == "block_rest" and case.lisa.get("unit") != "matrix")
        and not (role == "adapters" and "adapters" not in case.lisa)
    )


def put_adapters(model: nn.Module, adapters: dict[str, Any]) -> None:
    """PEFT's own on every linear of the blocks, without lisa_ds."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = adapters["rank"]
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=paths), model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def limited(norm: float, before: float | None, growth: float | None) -> float:
    """A gradient's norm under the limiter, given that of the step before."""
    if growth is None or not before:
        return norm
    return min(norm, growth * before)


def reference(
    case: Case,
    world_size: int,
    layers: list[tuple[int, ...]],
    build: Callable[[], nn.Module] | None = None,
    ages_restart: bool = False,
    device: str = "cpu",
) -> Outcome:
    """The run in one process: plain torch, AdamW, fp32 master weights of 16-bit models kept only while sampled.

    Args:
        case: What to run.
        world_size: Ranks whose micro-batches make up one step.
        layers: Blocks trained in each interval.
        build: Makes the model, if it is not ``case``'s own.
        ages_restart: A mistake: every switch begins the re-warm-up of all units, also of those that stay.
        device: Where it computes.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    model = (build() if build else build_model(case.tied, width=case.width, heads=case.heads)).to(device, dtype)
    if adapters := case.lisa.get("adapters"):
        put_adapters(model, adapters)
    model.train()
    unit_of = units(model, case.lisa)
    named = dict(model.named_parameters())
    warmup, growth = case.lisa.get("rewarm_steps", 0), case.lisa.get("norm_growth_limit")
    forgets = case.lisa.get("optimizer") == {"moments": "none"}  # each step is AdamW's first
    always = {role for role in ROLES if role == "adapters" or case.lisa.get(role, "always") == "always"}
    in_for: dict[int | str, int] = {}  # steps that a unit has taken since it came in
    last_norm: dict[int | str, float] = {}
    roles_visited, times_limited = [], 0
    decay = {name: 0.1 if p.dim() > 1 else 0.0 for name, p in named.items()}
    scale = {name: case.lisa.get(f"{unit}_lr_scale", 1.0) for name, unit in unit_of.items()}
    scale |= {n: adapters.get("learning_rate_scale", 10.0) for n, u in unit_of.items() if adapters and u == "adapters"}
    master: dict[str, Tensor] = {}
    optimizers: dict[str, torch.optim.AdamW] = {}
    losses, norms, visited = [], [], []
    applied = 0
    for step, micro in enumerate(micro_batches(case, world_size)):
        interval = applied // case.interval_steps
        sampled, roles = layers[interval], roles_in(case, interval)
        visited.append(sampled)
        roles_visited.append(roles)
        trained = [n for n, unit in unit_of.items() if unit in (*sampled, *roles)]
        for unit in [unit for unit in in_for if unit not in (*sampled, *roles)]:
            del in_for[unit]
            last_norm.pop(unit, None)
        if ages_restart and applied % case.interval_steps == 0:
            in_for.clear()
        for name, parameter in named.items():
            parameter.requires_grad_(name in trained)
        for name in [n for n in master if n not in trained]:
            del master[name], optimizers[name]
        for name in trained:
            if name not in master:
                master[name] = named[name].detach().float().clone()
                optimizers[name] = torch.optim.AdamW(
                    [master[name]], lr=1e-3, eps=EPS, weight_decay=decay[name], foreach=False
                )
        accumulated = {name: torch.zeros_like(master[name]) for name in trained}
        total = 0.0
        for batch in micro:
            mean = {name: torch.zeros_like(named[name]) for name in trained}
            for rank in range(world_size):
                rows = batch[rank * MICRO_BATCH : (rank + 1) * MICRO_BATCH].to(device)
                loss = model(input_ids=rows, labels=rows).loss
                total += loss.item() / world_size / case.accumulation
                (loss / case.accumulation).backward()
                for name in trained:
                    mean[name] += named[name].grad / world_size  # in the model's dtype, as it travels
                    named[name].grad = None
            for name in trained:
                accumulated[name] += mean[name].float()
        losses.append(total)
        if case.overflow_at == step:
            norms.append(float("inf"))
            continue
        for unit in {unit_of[name] for name in trained}:
            of_unit = [accumulated[name] for name in trained if unit_of[name] == unit]
            whole = float(torch.cat([gradient.flatten() for gradient in of_unit]).norm())
            allowed = limited(whole, last_norm.get(unit), growth)
            last_norm[unit] = allowed
            if allowed < whole:
                times_limited += 1
                for gradient in of_unit:
                    gradient *= allowed / whole
        norm = torch.stack([g.norm() for g in accumulated.values()]).norm()
        norms.append(norm.item())
        lr = 1e-3 * (1.0 / (1 + applied) if case.scheduler else 1.0)
        shrink = 1.0 / max(1.0, (norm.item() + 1e-6) / case.clip) if case.clip else 1.0
        for name in trained:
            master[name].grad = accumulated[name] * shrink
            warm = 1.0
            if warmup and unit_of[name] not in always:
                warm = min(1.0, (in_for.get(unit_of[name], 0) + 1) / warmup)
            optimizers[name].param_groups[0]["lr"] = lr * scale[name] * warm
            if forgets:
                optimizers[name].state.clear()
            optimizers[name].step()
            with torch.no_grad():
                named[name].copy_(master[name])
        for unit in {unit_of[name] for name in trained}:
            in_for[unit] = in_for.get(unit, 0) + 1
        applied += 1
    extra = {"roles": roles_visited, "limited": times_limited}
    return Outcome(losses, norms, {n: p.detach().float().cpu() for n, p in named.items()}, visited, extra)


def deepspeed_config(case: Case, world_size: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 20_000 if case.prefetch else 0,
        **case.zero,
    }
    if case.small_buckets:
        zero["reduce_bucket_size"] = 2_000
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if case.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if case.autotp > 1:
        config["tensor_parallel"] = {"autotp_size": case.autotp}
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "min_loss_scale": 1}
    return config
