"""What ranks have imported when they are forked: imported by the process that they are forked from, see :mod:`tests.ranks`.

Nothing here may start a thread, which a fork would lose, or touch CUDA.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

MODULES = (
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
    "peft",
    "lisa_ds.cli",
    "lisa_ds.engines.zero3.entry",
    "lisa_ds.integrations.hf",
    "lisa_ds.train.run",
)

for name in MODULES:
    with contextlib.suppress(ImportError):  # of packages that may be missing: a test that needs them says so
        importlib.import_module(name)

# Compiled at first use, loaded in a second or two each time after. What cannot be compiled is left to those who need it.
for builder in (ShareMemCommBuilder, CPUAdamBuilder):
    with contextlib.suppress(Exception):
        builder().load(verbose=False)

torch.set_num_threads(1)

# DeepSpeed collects garbage at every engine: a rank need not look through what it was born with.
gc.collect()
gc.freeze()
