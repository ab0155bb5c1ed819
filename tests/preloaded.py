"""What ranks have imported when they are forked: imported by the process that they are forked from, see :mod:`tests.ranks`.

Nothing here may start a thread, which a fork would lose, or touch CUDA.
"""

from __future__ import annotations

import contextlib
import gc

import torch
import torch._inductor.compile_fx
import torch.distributed.tensor
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

torch.set_num_threads(1)

# Compiled at first use, loaded in a second or two each time after. What cannot be compiled is left to those who need it.
for _builder in (ShareMemCommBuilder, CPUAdamBuilder):
    with contextlib.suppress(Exception):
        _builder().load()

# DeepSpeed collects garbage at every engine: a rank need not look through what it was born with.
gc.collect()
gc.freeze()
