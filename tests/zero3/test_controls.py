"""What goes wrong without the window, seen on the stock engine; and that other engines of the process stay stock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.zero3.control_runs import run_beside_a_reference_model, run_stock_toggling, run_two_stacks
from tests.zero3.trajectory import LAYERS

pytestmark = pytest.mark.multirank


def test_stock_zero3_moves_frozen_blocks_and_never_trains_late_ones(tmp_path: Path) -> None:
    for seen in run_ranks(2, run_stock_toggling, tmp_path):
        assert seen["freeze"] > 1e-4  # momentum and weight decay go on
        assert seen["unfreeze"] == 0.0
        assert seen["unfreeze, gradients left"] > 0  # full and unreduced, kept for ever


def test_a_reference_model_stays_stock(tmp_path: Path) -> None:
    for seen in run_ranks(2, run_beside_a_reference_model, tmp_path):
        assert seen["kinds"] == ["LisaEngine", "DeepSpeedEngine", "DeepSpeedEngine"]
        assert seen["optimizers"] == [
            "FusedStage3",
            "DeepSpeedZeroOptimizer_Stage3",
            "DeepSpeedZeroOptimizer_Stage3",
        ]
        assert seen["lisa"]
        assert seen["seen_as_engines"]
        assert seen["restored"]
        assert seen["reference_unmoved"]
        assert seen["reference_trainable"]
        assert seen["policy_moved"] > 10
        assert seen["forgetful_in_reference"] == 0
        assert seen["forgetful_in_policy"] == LAYERS * 7 + 1
        assert seen["linear_restored"]


@pytest.mark.more
def test_frozen_embeddings_and_reentrant_checkpointing_in_encoders_and_decoders(tmp_path: Path) -> None:
    for seen in run_ranks(2, run_two_stacks, tmp_path):
        assert seen["t5"]["moved"] == [0, 1, 2, 3, 4, 5]  # three of the encoder, three of the decoder
        assert seen["bert"]["moved"] == [0, 1, 2, 3]
        for model in ("t5", "bert"):
            assert seen[model]["loss"] <= 1e-5
            assert seen[model]["parameter"] <= 1e-5
