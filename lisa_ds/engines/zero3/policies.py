"""From the LISA section to the model: who trains always, who never, and at which rate."""

from __future__ import annotations

from lisa_ds.config import LisaConfig
from lisa_ds.errors import ConfigError
from lisa_ds.layers import LayerStack
from lisa_ds.sampling import resolve_interval_steps

_ROLES = ("embeddings", "lm_head", "rest")


def apply(stack: LayerStack, config: LisaConfig) -> None:
    """Freeze what the policies say never trains.

    Raises:
        ConfigError: Tied embeddings and head are given different policies or rates, or nothing could train.
    """
    if stack.tied:
        _check_tied(config)
    for role in _ROLES:
        if getattr(config, role) == "never":
            for parameter in getattr(stack, role):
                parameter.requires_grad_(False)
    always = any(parameter.requires_grad for role in _ROLES for parameter in getattr(stack, role))
    if config.sampler.name == "bernoulli" and not always:
        raise ConfigError(
            "lisa.sampler: 'bernoulli' may draw no layer at all, and with embeddings, lm_head and rest at 'never' nothing "
            "would train; choose 'uniform', or let one of them train always"
        )


def _check_tied(config: LisaConfig) -> None:
    given = config.model_fields_set
    for embeddings, head in (("embeddings", "lm_head"), ("embeddings_lr_scale", "lm_head_lr_scale")):
        first, second = getattr(config, embeddings), getattr(config, head)
        if head in given and first != second:
            raise ConfigError(
                f"lisa.{head}: got {second!r}, but the model's head is tied to its embeddings, which have {first!r}; they "
                f"are one weight and follow lisa.{embeddings}. Remove lisa.{head} or set both alike"
            )


def interval_steps(config: LisaConfig, steps_per_epoch: int | None) -> int:
    """Optimizer steps in an interval, with epochs resolved."""
    return resolve_interval_steps(config, steps_per_epoch)


def lr_scales(stack: LayerStack, config: LisaConfig) -> dict[int | str, float]:
    """Learning-rate factor of each role; a tied weight follows the embeddings."""
    return {role: getattr(config, f"{role}_lr_scale") for role in _ROLES}
