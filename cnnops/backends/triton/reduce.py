"""Second passes of sums that many programs share.

    total[i] = sum over splits of slabs[split, i]

Layout     slabs [SPLITS, count], total [count].
Ownership  One program owns BLOCK sums, each a tree of fixed shape, so the result is deterministic.
Traffic    slabs once, total once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slab_sum_kernel(slabs, total, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS).to(tl.int64)
    values = tl.load(slabs + (split * count)[:, None] + i[None, :], mask=(i < count)[None, :], other=0.0)
    tl.store(total + i, tl.sum(values, 0).to(total.dtype.element_ty), mask=i < count)
