"""Device functions for packed rows: which sequence a row belongs to, and where that sequence begins."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(p_counts, B, o_n, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):
    """Sequence and its first row for each of the rows o_n (BLOCK_N,), when B sequences of p_counts rows are packed.

    Also the number of rows in all. Rows past it belong to sequence B, which begins there. Reads the B counts once,
    (BLOCK_N, BLOCK_B) at a time; sequences of no rows are passed over. int64 throughout but for the sequence.
    """
    group = tl.zeros((BLOCK_N,), tl.int32)
    first = tl.zeros((BLOCK_N,), tl.int64)
    total = tl.zeros((), tl.int64)
    for b in range(0, B, BLOCK_B):
        o_b = b + tl.arange(0, BLOCK_B)
        m_b = o_b < B
        count = tl.load(p_counts + o_b, mask=m_b, other=0).to(tl.int64)
        end = total + tl.cumsum(count, 0)
        passed = (end[None, :] <= o_n[:, None]) & m_b[None, :]
        group += tl.sum(passed.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(passed, end[None, :], 0), 1))
        total += tl.sum(count, 0)
    return group, first, total


@triton.jit
def store_offsets(p_counts, p_offsets, B, most, limit, BLOCK_B: tl.constexpr):
    """Write the B + 1 int32 offsets of B packed sequences of p_counts rows, each cut to `most`, none above `limit`."""
    tl.store(p_offsets, 0)
    total = tl.zeros((), tl.int64)
    for b in range(0, B, BLOCK_B):
        o_b = b + tl.arange(0, BLOCK_B)
        count = tl.minimum(tl.load(p_counts + o_b, mask=o_b < B, other=0).to(tl.int64), most)
        end = tl.minimum(total + tl.cumsum(count, 0), limit)
        tl.store(p_offsets + 1 + o_b, end.to(tl.int32), mask=o_b < B)
        total += tl.sum(count, 0)
