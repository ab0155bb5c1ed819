"""Applies the LISA section's policies to a model: which roles train when, at which rate, and what is frozen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import policy_of
from lisa_ds.errors import ConfigError, ModelError
from lisa_ds.layers import ROLES, LayerStack
from lisa_ds.sampling import LayerSampler
from lisa_ds.sampling.matrices import Matrices
from lisa_ds.units import numel


@dataclass(frozen=True)
class Frozen:
    """Parameters that were frozen before the engine was built; they stay frozen."""

    units: tuple[int, ...]
    """Blocks, or matrices where they are drawn, in which nothing can train: they are left out of the draw."""

    names: tuple[str, ...]
    """All parameters that do not require grad, except those of roles that never train anyway."""

    notices: tuple[str, ...]
    """Notices for the user, a line each."""


def check(model: nn.Module, config: LisaConfig) -> None:
    """Refuse a config that does not fit ``model``, as the engine would once the weights are loaded.

    Args:
        model: The model, or its skeleton on the meta device; it is not used afterwards.
        config: Its LISA section.

    Raises:
        ConfigError: As :func:`apply`, or there are fewer layers than are to be sampled.
        ModelError: It has no block stack, or ``layers_path`` leads to none.
    """
    stack = LayerStack.of_run(model, config)
    LayerSampler(len(stack.layers), config, interval_steps=1, matrices=matrices(stack, config))
    apply(stack, config, {id(parameter) for parameter in model.parameters()})


def matrices(stack: LayerStack, config: LisaConfig) -> Matrices | None:
    """What is drawn of ``stack``, where that is not blocks."""
    if config.unit == "block":
        return None
    return Matrices(
        sizes=tuple(sum(numel(p) for p in unit.parameters if p.requires_grad) for unit in stack.units),
        blocks=tuple(unit.block for unit in stack.units),
        follows=tuple(unit.follows for unit in stack.units),
        num_blocks=len(stack.layers),
    )


def apply(stack: LayerStack, config: LisaConfig, owned: Collection[int]) -> Frozen:
    """Freeze what the policies say never trains, and find out what was frozen beforehand.

    Args:
        stack: The model.
        config: Its LISA section.
        owned: ``id`` of each parameter that the optimizer holds.

    Raises:
        ConfigError: Tied embeddings and head are given different policies or rates, or there could be an interval in which
            nothing would train.
        ModelError: Nothing can train in any block, or the optimizer lacks all that could in one.
    """
    for unit in stack.all_units:
        for parameter in stack.parameters(unit):
            # An earlier engine of this model froze it, until its unit would have been sampled; its owner did not.
            if getattr(parameter, "lisa_waits", False):
                parameter.requires_grad_(True)
    frozen = _frozen(stack, config)
    if stack.tied:
        _check_tied(config)
    for role in ROLES:
        if policy_of(config, role, tied=stack.tied) == "never":
            for parameter in stack.parameters(role):
                parameter.requires_grad_(False)
    trainable = {id(p) for unit in stack.all_units for p in stack.parameters(unit) if p.requires_grad}
    trainable &= set(owned)
    if len(frozen.units) == len(stack.units):
        raise ModelError(
            "every layer is frozen: no parameter in any requires grad; unfreeze those that are to be drawn before the engine is built"
        )
    drawn = config.sampler.layers or range(len(stack.units))
    idle = [i for i in drawn if i < len(stack.units) and trainable.isdisjoint(map(id, stack.parameters(i)))]
    if idle := [i for i in idle if i not in frozen.units]:
        raise ModelError(
            f"{stack.told(idle)} have parameters that require grad, but the optimizer holds none of them, so an interval that draws "
            "them would train nothing there: give the optimizer every parameter, freeze those layers, or name the others in "
            "lisa.sampler: {name: fixed, layers: [...]}"
        )
    always = [
        role
        for role in always_roles(config, tied=stack.tied)
        if not trainable.isdisjoint(map(id, stack.parameters(role)))
    ]
    if config.sampler.varies and not always:
        key, other = ("sampler.draw", "systematic") if config.sampler.by_scores else ("sampler", "uniform")
        raise ConfigError(
            f"lisa.{key}: 'bernoulli' may draw no layer at all, and in an interval in which none of embeddings, lm_head and rest "
            f"is there to train either, nothing would; choose {other!r}, or let one of them train always"
        )
    return frozen


def _frozen(stack: LayerStack, config: LisaConfig) -> Frozen:
    units = stack.all_units
    frozen = {unit: [stack.names[id(p)] for p in stack.parameters(unit) if not p.requires_grad] for unit in units}
    counts = {unit: (len(frozen[unit]), len(stack.parameters(unit))) for unit in units}
    layers = [i for i in range(len(stack.units)) if counts[i][0] == counts[i][1]]
    partly = [i for i in range(len(stack.units)) if 0 < counts[i][0] < counts[i][1]]
    notices = []
    if layers:
        notices.append(
            f"{stack.told(layers)} are frozen: no parameter of theirs requires grad. They are left out of the draw"
        )
    if partly and len(partly) + len(layers) < len(stack.units):  # not in all alike, as under adapters
        first = partly[0]
        notices.append(
            f"{stack.told(partly)} are frozen in part, and that part stays so: in {stack.units[first].name if stack.by_matrices else f'layer {first}'}, {counts[first][0]} of {counts[first][1]} "
            f"parameters ({', '.join(frozen[first][:2])}{', ...' if len(frozen[first]) > 2 else ''})"
        )
    for role in ROLES:
        if frozen[role] and policy_of(config, role, tied=stack.tied) != "never":
            notices.append(
                f"{role}: {counts[role][0]} of {counts[role][1]} parameters are frozen ({frozen[role][0]}"
                f"{', ...' if len(frozen[role]) > 1 else ''}) and stay so, whatever lisa.{role} says"
            )
    asked = [unit for unit in units if isinstance(unit, int) or policy_of(config, unit, tied=stack.tied) != "never"]
    return Frozen(tuple(layers), tuple(name for unit in asked for name in frozen[unit]), tuple(notices))


def always_roles(config: LisaConfig, *, tied: bool) -> tuple[str, ...]:
    """The roles that train in every interval."""
    return tuple(role for role in ROLES if policy_of(config, role, tied=tied) == "always")


def told(config: LisaConfig, units: Sequence[int], roles: Sequence[str]) -> str:
    """What trains in an interval, for a log line; roles are named if they differ between intervals."""
    what = f"layers {list(units)}" if config.unit == "block" else f"{len(units)} matrices"
    if all(getattr(config, role) in ("always", "never") for role in ("embeddings", "lm_head")):
        return what
    return f"{what} and {', '.join(roles) or 'nothing else'}"


def describe(config: LisaConfig) -> dict[str, str]:
    """What is drawn, the policy of each role and the format of the state, for a checkpoint: a run resumes under the same ones only."""
    return {
        "unit": config.unit,
        **{role: str(getattr(config, role)) for role in ROLES},  # of adapters their shapes
        "optimizer.precision": config.optimizer.precision,
        "optimizer.moments": config.optimizer.moments,
    }


def lr_scales(config: LisaConfig) -> dict[int | str, float]:
    """Learning-rate factor of each role; a tied weight belongs to the embeddings, and has their factor."""
    return {role: config.lr_scale_of(role) for role in ROLES}


def rates(config: LisaConfig, roles: Sequence[str], lr: float) -> str:
    """The learning rates of what is drawn and of each role, for a log line.

    Args:
        config: The LISA section.
        roles: The roles in which something may train.
        lr: The optimizer's own rate.

    Example:
        >>> rates(LisaConfig(embeddings_lr_scale=0.1), ["embeddings", "rest"], 5e-5)
        '5e-05 (layers, rest), 5e-06 (embeddings)'
    """
    cap = config.sampler.inverse_probability_cap
    drawn = "layers" if config.unit == "block" else "matrices"
    drawn += f", by probability to {lr * cap:.3g} at most" if cap else ""
    by_rate: dict[str, list[str]] = {f"{lr:.3g}": [drawn]}
    for role in roles:
        by_rate.setdefault(f"{lr * config.lr_scale_of(role):.3g}", []).append(role)
    return ", ".join(f"{rate} ({', '.join(names)})" for rate, names in by_rate.items())


def _check_tied(config: LisaConfig) -> None:
    given = config.model_fields_set
    for embeddings, head in (("embeddings", "lm_head"), ("embeddings_lr_scale", "lm_head_lr_scale")):
        first, second = getattr(config, embeddings), getattr(config, head)
        if head in given and first != second:
            raise ConfigError(
                f"lisa.{head}: got {second!r}, but the model's head is tied to its embeddings, which have {first!r}; they "
                f"are one weight and follow lisa.{embeddings}. Remove lisa.{head} or set both alike"
            )
