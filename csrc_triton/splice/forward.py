"""Triton kernels of splice, forward: the plan of a batch of prompts, and the row gather from two sources.

Shape legend: B prompts, L text positions, D width, N audio rows, P audio segments, M output positions a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import tuning
from csrc_triton.launch import block, row_key, row_sizes
from csrc_triton.ragged import locate, store_offsets

IGNORE = tl.constexpr(-100)
LAYOUTS = {"right": 0, "left": 1, "packed": 2}
TILE = 4096  # elements of a copied tile, 32 a thread


@triton.jit(do_not_specialize=["B", "L", "P"])
def _plan_kernel(
    p_placeholder,  # (B, L) bool
    p_valid,  # (B, L) any dtype, not read unless HAS_VALID
    p_cu_audio,  # (P + 1,) int32
    p_ends,  # (B, L) int32, written
    p_segment,  # (B, L) int32, written
    p_home,  # (P,) int32, written
    p_report,  # (3, B) int32, written
    B,
    L,
    P,
    HAS_VALID: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """What becomes of each position of one prompt (see `plan_splice`). Grid (B + 1,).

    A program first counts the placeholders of the prompts before its own, so that nothing is handed between programs.
    Program B writes the homes of segments that no placeholder asks for; every other home is written by the prompt that
    holds its placeholder. No two threads write one element.
    """
    i_b = tl.program_id(0).to(tl.int64)
    seen = tl.zeros((), tl.int32)  # placeholders so far: the next one's segment
    for p in range(0, i_b * L, BLOCK_L):
        o_p = p + tl.arange(0, BLOCK_L).to(tl.int64)
        before = tl.load(p_placeholder + o_p, mask=o_p < i_b * L, other=0)
        seen += tl.sum((before != 0).to(tl.int32), 0)
    if i_b == B:
        for i in range(seen, P, BLOCK_L):
            o_i = i + tl.arange(0, BLOCK_L)
            tl.store(p_home + o_i, -1, mask=o_i < P)
    else:
        base = seen
        length = tl.zeros((), tl.int32)
        outside = tl.zeros((), tl.int32)
        for i in range(0, L, BLOCK_L):
            o_l = i + tl.arange(0, BLOCK_L)
            m_l = o_l < L
            position = i_b * L + o_l
            placeholder = tl.load(p_placeholder + position, mask=m_l, other=0) != 0
            valid = m_l
            if HAS_VALID:
                valid = tl.load(p_valid + position, mask=m_l, other=0) != 0
            mark = placeholder.to(tl.int32)
            segment = seen + tl.cumsum(mark, 0) - mark
            known = placeholder & (segment < P)
            placed = known & valid
            text = valid & (mark == 0)
            start = tl.load(p_cu_audio + segment, mask=placed, other=0)
            end = tl.load(p_cu_audio + segment + 1, mask=placed, other=0)
            width = tl.where(placed, end - start, text.to(tl.int32))
            tl.store(p_ends + position, length + tl.cumsum(width, 0), mask=m_l)
            tl.store(p_segment + position, tl.where(placed, segment, tl.where(text, -1, -2)), mask=m_l)
            tl.store(p_home + segment, tl.where(valid, position, -1).to(tl.int32), mask=known)
            length += tl.sum(width, 0)
            seen += tl.sum(mark, 0)
            outside += tl.sum((placeholder & (valid == 0)).to(tl.int32), 0)
        tl.store(p_report + i_b, length)
        tl.store(p_report + B + i_b, seen - base)
        tl.store(p_report + 2 * B + i_b, outside)


def plan_splice(
    placeholder_BL: Tensor,  # bool
    valid_BL: Tensor | None,  # non-zero where there is text
    cu_seqlens_P: Tensor,  # (P + 1,) int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What becomes of each position, whatever the layout; all int32; one launch.

    ends (B, L):    where its rows end within the spliced prompt; text is 1 long, padding 0.
    segment (B, L): the audio segment it is replaced by; -1 for text, -2 where nothing remains.
    home (P,):      flat position b * L + l of the placeholder of each segment, -1 for a segment without one.
    report (3, B):  length of each spliced prompt, placeholders in it, and those of them that lie in padding.
    """
    B, L = placeholder_BL.shape
    P = cu_seqlens_P.numel() - 1
    placeholder_BL = placeholder_BL.contiguous()
    ends, segment, home, report = (cu_seqlens_P.new_empty(shape) for shape in ((B, L), (B, L), (P,), (3, B)))
    _plan_kernel[(B + 1,)](
        placeholder_BL,
        placeholder_BL if valid_BL is None else valid_BL.contiguous(),
        cu_seqlens_P,
        ends,
        segment,
        home,
        report,
        B,
        L,
        P,
        HAS_VALID=valid_BL is not None,
        BLOCK_L=block(L, most=1024),
    )
    return ends, segment, home, report


@triton.jit(do_not_specialize=["B", "L", "N", "M", "rows"])
def _rows_kernel(
    p_text,  # (B, L, D), any strides
    p_audio,  # (N, D), any strides
    p_cu_audio,  # (P + 1,) int32
    p_ends,  # (B, L) int32
    p_segment,  # (B, L) int32
    p_lengths,  # (B,) int32
    p_labels,  # (B, L), any strides, not read unless HAS_LABELS
    p_embeds,  # (rows, D), written
    p_mask,  # (rows,), written unless packed
    p_positions,  # (rows,) int64, written
    p_new_labels,  # (rows,), written if HAS_LABELS
    p_cu_seqlens,  # (B + 1,) int32, written by program 0
    B,
    L,
    N,
    D,
    M,
    rows,
    stride_text_b,
    stride_text_l,
    stride_text_d,
    stride_audio_n,
    stride_audio_d,
    stride_label_b,
    stride_label_l,
    LAYOUT: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write BLOCK_N output rows a program, each from the one text position or audio row it stands for, else 0.

    Grid (rows / BLOCK_N, at least 1). The position a row comes from is the number of positions of its prompt that end
    at or before it. Rows are copied, audio cast to the text's dtype. Every output element is written once.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < rows
    if LAYOUT == 2:
        group, first, total = locate(p_lengths, B, o_n, BLOCK_N, BLOCK_B)
        b = group.to(tl.int64)
        within = o_n - first
        there = m_n & (o_n < total)
    else:
        b = o_n // tl.maximum(M, 1)
        within = o_n - b * M
        length = tl.load(p_lengths + b, mask=m_n, other=0).to(tl.int64)
        if LAYOUT == 1:
            within += length - M
        there = m_n & (within >= 0) & (within < length)
    if i_n == 0:
        store_offsets(p_lengths, p_cu_seqlens, B, M, rows, BLOCK_B)

    at = tl.zeros((BLOCK_N,), tl.int64)
    for i in range(0, L, BLOCK_L):
        o_l = i + tl.arange(0, BLOCK_L)
        m_l = there[:, None] & (o_l < L)[None, :]
        end = tl.load(p_ends + b[:, None] * L + o_l[None, :], mask=m_l, other=0)
        at += tl.sum((m_l & (end <= within[:, None])).to(tl.int32), 1)
    segment = tl.load(p_segment + b * L + at, mask=there, other=-2)
    from_text = there & (segment < 0)
    from_audio = there & (segment >= 0)
    # counted from its end, which the plan knows, an audio row is as far from its segment's end
    left = tl.load(p_ends + b * L + at, mask=from_audio, other=0) - within
    n = tl.load(p_cu_audio + segment + 1, mask=from_audio, other=0) - left
    m_audio = (from_audio & (n >= 0) & (n < N))[:, None]  # offsets are not checked on a GPU

    tl.store(p_positions + o_n, tl.where(there, within, 0), mask=m_n)
    if LAYOUT != 2:
        tl.store(p_mask + o_n, there.to(p_mask.dtype.element_ty), mask=m_n)
    if HAS_LABELS:
        m_label = from_text
        if LAYOUT == 2:  # the row before a prompt's first is another prompt's
            m_label = from_text & (within > 0)
        label = tl.load(p_labels + b * stride_label_b + at * stride_label_l, mask=m_label, other=IGNORE)
        tl.store(p_new_labels + o_n, label, mask=m_n)
    p_text += (b * stride_text_b + at * stride_text_l)[:, None]
    p_audio += (n * stride_audio_n)[:, None]
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        m_d = o_d < D
        x = tl.load(p_text + o_d * stride_text_d, mask=from_text[:, None] & m_d, other=0)
        y = tl.load(p_audio + o_d * stride_audio_d, mask=m_audio & m_d, other=0)
        x = tl.where(from_audio[:, None], y.to(x.dtype), x)
        tl.store(p_embeds + o_n[:, None] * D + o_d, x, mask=m_n[:, None] & m_d)


def splice_rows(
    text_BLD: Tensor,
    audio_ND: Tensor,
    cu_seqlens_P: Tensor,  # (P + 1,) int32 offsets of the audio
    ends_BL: Tensor,
    segment_BL: Tensor,
    home_P: Tensor,
    lengths_B: Tensor,  # int32, of the spliced prompts
    labels_BL: Tensor | None,
    mask_dtype: torch.dtype | None,
    layout: str,
    length: int,  # M
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """Embeddings (B, M, D), mask (B, M), position ids (B, M), labels (B, M), cu_seqlens (B + 1,) int32: one launch.

    Packed, they have one row of M. What does not fit into M is left out, at the end or, on the left layout, at the
    beginning; cu_seqlens counts what is there. Packed, the first label of every prompt becomes -100: the row before it
    is another prompt's.
    """
    B, L, D = text_BLD.shape
    shape = (1 if layout == "packed" else B, length)
    rows = shape[0] * length
    embeds = text_BLD.new_empty(*shape, D)
    positions = text_BLD.new_empty(shape, dtype=torch.int64)
    mask = None if mask_dtype is None else text_BLD.new_empty(shape, dtype=mask_dtype)
    labels = None if labels_BL is None else labels_BL.new_empty(shape)
    cu_seqlens = cu_seqlens_P.new_empty(B + 1)

    def start(**sizes: int) -> None:
        _rows_kernel[(max(triton.cdiv(rows, sizes["BLOCK_N"]), 1),)](
            text_BLD,
            audio_ND,
            cu_seqlens_P,
            ends_BL,
            segment_BL,
            lengths_B,
            positions if labels_BL is None else labels_BL,
            embeds,
            positions if mask is None else mask,
            positions,
            positions if labels is None else labels,
            cu_seqlens,
            B,
            L,
            audio_ND.shape[0],
            D,
            length,
            rows,
            *text_BLD.stride(),
            *audio_ND.stride(),
            *((0, 0) if labels_BL is None else labels_BL.stride()),
            LAYOUT=LAYOUTS[layout],
            HAS_LABELS=labels_BL is not None,
            BLOCK_B=block(B, most=64),
            BLOCK_L=block(L, most=128),
            **sizes,
        )

    tuning.launch("splice rows", row_key(text_BLD), row_sizes(D, TILE, 16), start)
    return embeds, mask, positions, labels, cu_seqlens
