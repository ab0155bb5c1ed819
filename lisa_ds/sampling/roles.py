"""Which of embeddings, head and rest train in an interval: a pure function of the seed and the interval's index.

A role that is ``sampled`` has a draw of its own, with its own seed: it does not change which blocks train, and
embeddings and head do not change each other's draws.
"""

from __future__ import annotations

import random

from lisa_ds.config import LisaConfig
from lisa_ds.config.roles import ROLES, Every, policy_of, share_of


def roles_at(config: LisaConfig, interval: int, *, num_layers: int, tied: bool) -> tuple[str, ...]:
    """Return the roles that train in ``interval`` (from 0), in the order of :data:`~lisa_ds.config.roles.ROLES`.

    A tied head trains when the embeddings do.

    Args:
        config: The ``lisa`` section; its policies, seed and number of sampled blocks are used.
        interval: Index of the interval, from 0.
        num_layers: Number of blocks of the model.
        tied: Whether its head shares its weight with the embeddings.

    Raises:
        ConfigError: See ``LisaConfig.num_sampled``.
        ValueError: ``interval`` is negative.

    Example:
        >>> config = LisaConfig.load({"embeddings": {"every": 3}, "lm_head": "never"})
        >>> [roles_at(config, interval, num_layers=32, tied=False) for interval in (0, 1, 3)]
        [('embeddings', 'rest'), ('rest',), ('embeddings', 'rest')]
    """
    if interval < 0:
        raise ValueError(f"roles_at: interval={interval}")
    return tuple(role for role in ROLES if _trains(config, role, interval, num_layers, tied))


def _trains(config: LisaConfig, role: str, interval: int, num_layers: int, tied: bool) -> bool:
    if role == "block_rest" and config.unit == "block":
        return False  # blocks are drawn whole
    policy = policy_of(config, role, tied=tied)
    if isinstance(policy, Every):
        return interval % policy.every == 0
    if policy == "sampled":
        source = "embeddings" if tied else role  # one draw
        share = share_of(config, role, tied=tied, num_layers=num_layers)
        return random.Random(f"{source}/{config.seed}/{interval}").random() * num_layers < share * num_layers
    return policy == "always"
