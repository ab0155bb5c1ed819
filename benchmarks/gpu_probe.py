"""The memory traffic of one fp32 AdamW step and nothing else, as a Triton kernel: four arrays read, three of them written."""

import triton
import triton.language as tl


@triton.jit
def traffic(a_at, b_at, c_at, d_at, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    b = tl.load(b_at + i, mask=inside)
    tl.store(a_at + i, tl.load(a_at + i, mask=inside) * 0.999 + b, mask=inside)
    tl.store(c_at + i, tl.load(c_at + i, mask=inside) * 0.999 + b, mask=inside)
    tl.store(d_at + i, tl.load(d_at + i, mask=inside) * 0.999 + b, mask=inside)
