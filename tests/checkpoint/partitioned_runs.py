"""A PEFT model under ZeRO-3, which cannot be merged where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoint.adapter_cases import CASES, build


def merged_under_zero3(root: str) -> dict[str, Any]:
    """What is said of it, and whether nothing was merged."""
    import deepspeed

    from lisa_ds.checkpoint import merged
    from lisa_ds.errors import CheckpointError

    deepspeed.init_distributed(dist_backend="gloo")
    model = build(CASES["lora"], Path(root))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    try:
        with merged(engine.module):
            said = "nothing"
    except CheckpointError as error:
        said = str(error)
    merged_ones = [name for name, module in model.named_modules() if getattr(module, "merged", False) is True]
    return {"said": said, "merged": merged_ones}
