"""Device functions the attention kernels share: where an utterance's rows lie, tiles of queries, dropout, dS.

Shape legend in csrc_triton/varlen_cross_attention/__init__.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(p_cu_seqlens, i_b, B, rows):
    """First row (int64) and number of rows (int32) of utterance i_b; of i_b == B, the rows that no utterance has.

    Offsets that make no sense are clamped, so that nothing outside 0..rows is ever touched.
    """
    start = tl.load(p_cu_seqlens + i_b).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_b + 1, mask=i_b < B, other=0).to(tl.int64)
    end = tl.where(i_b < B, end, rows)
    start = tl.minimum(tl.maximum(start, 0), rows)
    end = tl.minimum(tl.maximum(end, start), rows)
    return start, (end - start).to(tl.int32)


@triton.jit
def split_queries(o_m, m, R):
    """Rows of queries o_m, counted from the row of query m, and their place among the R heads of one key head."""
    return o_m // R - m // R, o_m % R


@triton.jit
def score_scale(scale, n_k):
    """What dQ and dK are scaled by: 0 for a lone key, whose weight is 1 whatever q and k are.

    dP - delta is 0 there but for rounding, which would be all that is left and as large as other gradients' errors.
    """
    return tl.where(n_k > 1, scale, 0.0)


@triton.jit
def load_tile(p_x, o_row, o_d, m_row, m_d, EVEN_D: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, BLOCK_D) of x at offsets o_row from p_x, 0 where masked; widened where tl.dot cannot take the dtype.

    Offsets inside a tile are int32 (they are the same for every tile: fewer registers), the tile's own is in p_x.
    """
    mask = m_row[:, None] if EVEN_D else m_row[:, None] & m_d[None, :]
    x = tl.load(p_x + (o_row[:, None] + o_d[None, :]), mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_tile(p_x, o_row, o_d, m_row, m_d, x, EVEN_D: tl.constexpr):
    """The counterpart of load_tile, in p_x's dtype."""
    mask = m_row[:, None] if EVEN_D else m_row[:, None] & m_d[None, :]
    tl.store(p_x + (o_row[:, None] + o_d[None, :]), x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def load_lse(p_lse, o_row, m_row, rows):
    """Both parts of log-sum-exp, `rows` apart, of rows o_row; 0 where masked."""
    top = tl.load(p_lse + o_row, mask=m_row, other=0.0)
    return top, tl.load(p_lse + rows + o_row, mask=m_row, other=0.0)


@triton.jit
def keep_mask(p_seed, dropout_p, i_bg, o_m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool, True with probability 1 - dropout_p: a function of seed, head, query and key alone.

    One philox call gives the four keys 4j ... 4j + 3, whatever the size of the blocks.
    """
    o_c = n // 4 + tl.arange(0, BLOCK_N // 4)
    counter = o_c[None, :] + tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    query = o_m[:, None] + tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    r0, r1, r2, r3 = tl.philox(tl.load(p_seed), counter, query, i_bg.to(tl.int32) + counter * 0, counter * 0)
    r = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    return (r >> 8).to(tl.float32) * 5.9604645e-8 >= dropout_p  # 24 random bits: exact in float32


@triton.jit
def weights_and_grads(
    q_MD,
    do_MD,
    k_ND,
    v_ND,
    top_M,
    log_total_M,
    delta_M,
    m_m,
    m_n,
    p_seed,
    scale_log2,
    dropout_p,
    i_bg,
    o_m,
    n,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention weights as dV needs them (after dropout) and dS before the scale, both (BLOCK_M, BLOCK_N) float32.

    delta is rowsum(dO * O) = rowsum(P * dP). Masked entries are 0.
    """
    s = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    s = tl.where(m_n[None, :] & m_m[:, None], s, float("-inf"))
    p = tl.exp2((s - top_M[:, None]) * scale_log2 - log_total_M[:, None])
    dp = tl.dot(do_MD, tl.trans(v_ND), input_precision="ieee")
    kept = p
    if DROPOUT:
        keep = keep_mask(p_seed, dropout_p, i_bg, o_m, n, BLOCK_M, BLOCK_N)
        grown = 1.0 / (1.0 - dropout_p)
        kept = tl.where(keep, p * grown, 0.0)
        dp = tl.where(keep, dp * grown, 0.0)
    return kept, p * (dp - delta_M[:, None])
