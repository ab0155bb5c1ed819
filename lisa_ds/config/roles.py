"""When embeddings and head train: the values of ``lisa.embeddings`` and ``lisa.lm_head``, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field

from lisa_ds.config.base import Section, mistake, show

ROLES = ("embeddings", "lm_head", "rest", "block_rest", "adapters")
"""What of a model is not drawn, in the order of every list of it: ``block_rest`` is of blocks from which matrices are drawn,
``adapters`` are those of ``lisa.adapters``."""

_NAMES = ("always", "never", "sampled")
_CHOICES = "should be 'always', 'never', 'sampled' or {every: n}"


class Every(Section):
    """Trains in intervals 0, n, 2n, ..."""

    every: Annotated[int, Field(ge=1)]
    """The number n of intervals from one in which it trains to the next."""

    def __repr__(self) -> str:
        """As it is written in a config, for messages and checkpoints."""
        return f"{{every: {self.every}}}"

    __str__ = __repr__


def _policy(value: Any) -> Any:
    """Read a policy; a union's own messages would name the types in it instead of what the user wrote."""
    if isinstance(value, Every):
        return "always" if value.every == 1 else value
    if isinstance(value, Mapping):
        if list(value) != ["every"]:
            others = [key for key in value if key != "every"]
            raise mistake(
                f"has the one key 'every', got {', '.join(map(repr, others)) or 'none'}; write {{every: n}}, as in "
                "{every: 4}"
            )
        count = value["every"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise mistake(f"every should be a number of intervals, 1 or more, got {show(count)}")
        return "always" if count == 1 else Every(every=count)
    if not isinstance(value, str) or value not in _NAMES:
        raise mistake(_CHOICES, choices=_NAMES)
    return value


Fixed = Literal["always", "never"]
"""Policy of what trains in every interval or in none."""

Policy = Annotated[Literal["always", "never", "sampled"] | Every, BeforeValidator(_policy)]
"""When a role trains; ``{every: 1}`` is read as ``always``."""


class Policies(Protocol):
    """The part of the ``lisa`` section that decides when a role trains. That section imports this module."""

    @property
    def embeddings(self) -> str | Every:
        """When the embeddings train."""

    @property
    def lm_head(self) -> str | Every:
        """When the head trains."""

    @property
    def rest(self) -> str:
        """Whether the rest trains."""

    @property
    def block_rest(self) -> str:
        """When the small parameters of blocks train, from which matrices are drawn."""

    @property
    def adapters(self) -> object | None:
        """The adapters beside linears, which always train; None if there are none."""

    def share(self, num_layers: int) -> Fraction:
        """Share of a model of ``num_layers`` that is drawn in one interval."""


def policy_of(config: Policies, role: str, *, tied: bool) -> str | Every:
    """The policy of ``role``. What is left of a tied head, such as a bias, follows the embeddings' policy.

    Args:
        config: The ``lisa`` section.
        role: One of :data:`ROLES`.
        tied: Whether the model's head shares its weight with the embeddings.
    """
    if role == "adapters":
        return "never" if config.adapters is None else "always"
    policy: str | Every = getattr(config, "embeddings" if tied and role == "lm_head" else role)
    return policy


def share_of(config: Policies, role: str, *, tied: bool, num_layers: int) -> Fraction:
    """Share of the intervals in which ``role`` trains, on average: exactly, from 0 to 1.

    Raises:
        ConfigError: See ``LisaConfig.share``.
    """
    policy = policy_of(config, role, tied=tied)
    if isinstance(policy, Every):
        return Fraction(1, policy.every)
    if policy == "sampled":
        return config.share(num_layers)
    return Fraction(policy == "always")
