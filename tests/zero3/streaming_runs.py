"""What the ranks of tests/zero3/test_streaming.py do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig

from lisa_ds.config import ModelConfig
from lisa_ds.errors import ModelError
from lisa_ds.integrations.streaming import streamed
from lisa_ds.models import load_model
from lisa_ds.models.stored import StoredTensor

ZERO3 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def load_all(folder: Path, tasks: dict[str, str]) -> dict[str, Any]:
    """Each model of ``folder`` by plain ``from_pretrained`` and streamed under ZeRO-3: what differs, and what was said."""
    deepspeed.init_distributed(dist_backend="gloo")
    configs = {
        name: ModelConfig(
            name_or_path=str(folder / name), task=task, num_labels=3 if "classification" in task else None
        )
        for name, task in tasks.items()
    }
    plain = {name: load_model(config, torch.bfloat16).state_dict() for name, config in configs.items()}
    zero3 = HfDeepSpeedConfig(ZERO3)
    outcome = {}
    for name, config in configs.items():
        with _heard() as said, streamed():
            model = load_model(config, torch.bfloat16)
        outcome[name] = {"differ": _differ(model, plain[name]), "said": said}
    stock = StoredTensor.read_into
    StoredTensor.read_into = lambda self, target, start=0: stock(self, target)  # type: ignore[method-assign]
    try:
        with streamed():
            model = load_model(configs["plain"], torch.bfloat16)
        outcome["control"] = {"differ": _differ(model, plain["plain"])}
    finally:
        StoredTensor.read_into = stock  # type: ignore[method-assign]
    del zero3
    return outcome


def refusals(folders: list[Path]) -> list[str]:
    """What each rank is told of each damaged checkpoint."""
    deepspeed.init_distributed(dist_backend="gloo")
    zero3 = HfDeepSpeedConfig(ZERO3)
    told = []
    for folder in folders:
        try:
            with streamed():
                load_model(ModelConfig(name_or_path=str(folder)), torch.bfloat16)
            told.append("nothing")
        except ModelError as error:
            told.append(str(error))
    del zero3
    return told


def peaks(folder: Path, small: Path) -> dict[str, dict[str, int]]:
    """Bytes by which this rank grows at most while it loads ``folder``, by our loader and then by transformers'.

    A ``small`` model is loaded before, and with it the code: on a fresh machine Python compiles it first.
    """
    deepspeed.init_distributed(dist_backend="gloo")
    zero3 = HfDeepSpeedConfig(ZERO3)
    for loader in (streamed(), contextlib.nullcontext()):
        with loader:
            load_model(ModelConfig(name_or_path=str(small)), torch.bfloat16)
    outcome = {}
    for name, loader in {"streamed": streamed(), "stock": contextlib.nullcontext()}.items():
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        with loader:
            model = load_model(ModelConfig(name_or_path=str(folder)), torch.bfloat16)
        peak = _resident("VmHWM") - before
        parameters: list[Any] = list(model.parameters())
        outcome[name] = {
            "peak": peak,
            "partitions": sum(p.ds_tensor.nbytes for p in parameters),
            "largest": max(2 * p.ds_numel for p in parameters),
            "whole": sum(2 * p.ds_numel for p in parameters),
        }
        del model, parameters
        dist.barrier()
    del zero3
    return outcome


def _resident(kind: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    heard = _Heard()
    logger = logging.getLogger("lisa_ds")
    logger.addHandler(heard)
    try:
        yield heard.messages
    finally:
        logger.removeHandler(heard)


def _differ(model: Any, expected: dict[str, Tensor]) -> list[str]:
    """Names of weights and buffers that are not those of ``expected``, bit for bit."""
    differ = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        gathered = deepspeed.zero.GatheredParameters([tensor]) if hasattr(tensor, "ds_id") else contextlib.nullcontext()
        with gathered:
            if tensor.dtype != expected[name].dtype or not torch.equal(tensor.detach(), expected[name]):
                differ.append(name)
    return differ
