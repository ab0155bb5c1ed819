"""What the ZeRO-3 engine says of a config before weights are read, of parts that are frozen, and of roles that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(
    ("lisa", "error", "part"),
    [
        ({"num_sampled_layers": 3}, "ConfigError", "the model has 2 layers, got 3"),
        ({"layers_path": "model.layer"}, "ModelError", "model.layers"),
        ({"embeddings": "never", "lm_head": "always"}, "ConfigError", "lisa.lm_head"),
        ({"interval_steps": "1epoch"}, "", ""),
    ],
)
def test_a_config_is_held_against_the_skeleton_before_weights_are_read(
    tmp_path: Path, lisa: dict[str, Any], error: str, part: str
) -> None:
    from lisa_ds.config import LisaConfig, ModelConfig
    from lisa_ds.engines.common import policies
    from lisa_ds.errors import LisaError
    from lisa_ds.models import skeleton
    from tests.zero3 import trajectory

    trajectory.build_model(tied=True, layers=2).config.save_pretrained(tmp_path)  # a config.json, and no weights
    model = skeleton(ModelConfig(name_or_path=str(tmp_path)))
    assert all(parameter.is_meta for parameter in model.parameters())
    try:
        policies.check(model, LisaConfig.load(lisa))
        found = ("", "")
    except LisaError as refused:
        found = (type(refused).__name__, str(refused))
    assert found[0] == error
    assert part in found[1]


@pytest.mark.parametrize(
    ("frozen", "told"),
    [
        (["0.mlp.up_proj", "1.mlp.up_proj", "2.mlp.up_proj"], []),  # in all alike, as under adapters
        (["0.mlp.up_proj", "1.", "2.mlp.up_proj"], ["layers [1] are frozen: "]),
        (["0.mlp.up_proj", "2.mlp.up_proj"], ["layers [0, 2] are frozen in part, and that part stays so: in layer 0, 2 of 16 "]),
    ],
)  # fmt: skip
def test_parts_that_are_frozen_are_told_where_they_differ(frozen: list[str], told: list[str]) -> None:
    from lisa_ds.config import LisaConfig
    from lisa_ds.engines.common import policies
    from lisa_ds.layers import LayerStack
    from tests.zero3 import trajectory

    model = trajectory.build_model(layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(f"model.layers.{part}" for part in frozen)))
    found = policies.apply(LayerStack.from_model(model), LisaConfig(), {id(p) for p in model.parameters()})
    assert len(found.notices) == len(told)
    assert all(notice.startswith(part) for notice, part in zip(found.notices, told, strict=True))


@pytest.mark.parametrize(
    ("fields", "roles", "line"),
    [
        ({}, ("embeddings", "lm_head", "rest"), "layers [1, 3]"),
        ({"embeddings": "never"}, ("lm_head", "rest"), "layers [1, 3]"),
        ({"embeddings": "sampled"}, ("lm_head", "rest"), "layers [1, 3] and lm_head, rest"),
        ({"lm_head": {"every": 4}}, (), "layers [1, 3] and nothing else"),
    ],
)
def test_a_line_of_a_log_names_the_roles_where_they_come_and_go(
    fields: dict[str, Any], roles: tuple[str, ...], line: str
) -> None:
    from lisa_ds.config import LisaConfig
    from lisa_ds.engines.common import policies

    assert policies.told(LisaConfig.load(fields), (1, 3), roles) == line
