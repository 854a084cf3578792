"""Triton kernels of CTC's forward-backward over compact emissions: both recursions of a batch in one launch.

The 2 S + 1 states of an utterance are held as blank[i], i = 0..S, and label[i], i = 0..S-1, so that one shift a frame
is all that neighbours exchange. With l' = label[i - 1] (for i = 0 a virtual start) and log emissions e:

    blank[i] = e(blank) + log(exp blank[i] + exp l')
    label[i] = e(label i) + log(exp label[i] + exp blank[i] + [label i differs from label i - 1] exp l')

The backward recursion is the same over reversed time and reversed labels. A frame's emissions are taken relative to
their maximum, every 16 frames the states are re-centred to a maximum of 0, and both shifts go into a float64 scalar:
rounding stays that of small numbers, however long the input and however large the vocabulary.

Shape legend: T frames, B utterances, S longest target, K = S + 1 compact columns.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import tuning
from csrc_triton.launch import block
from csrc_triton.occupancy import occupancy

WIDEST = 4096  # bytes of states of one kind that a program keeps in registers; longer targets take several launches


@triton.jit
def _log_add(a, b):
    """log(exp a + exp b); -inf where both are."""
    high = tl.maximum(a, b)
    gap = tl.minimum(a, b) - tl.where(high == float("-inf"), 0.0, high)
    return high + tl.log(1.0 + tl.exp(gap))


@triton.jit
def _enter(blank, label, before, skip):
    """The states (blank, label) entered by one step, before the frame emits; before is label shifted by one."""
    leap = tl.where(skip, before, float("-inf"))
    high = tl.maximum(tl.maximum(label, blank), leap)
    dead = high == float("-inf")
    origin = tl.where(dead, 0.0, high)
    total = tl.exp(label - origin) + tl.exp(blank - origin) + tl.exp(leap - origin)
    return _log_add(blank, before), high + tl.log(tl.where(dead, 1.0, total))


@triton.jit
def _frame(p_frame, p_top, o_column, stride_k, o_state, labels, live):
    """Emissions (largest, blank, labels) of one frame, -inf without a label; nothing is read unless live.

    `live` is a scalar. It moves the bound of the mask instead of joining it by &: Triton's interpreter spreads a scalar
    condition to integers, which from triton 3.9 on are not accepted as a mask.
    """
    top = tl.load(p_top, mask=live, other=0.0)
    blank = tl.load(p_frame, mask=live, other=0.0)
    return (
        top,
        blank,
        tl.load(p_frame + o_column * stride_k, mask=o_state < tl.where(live, labels, 0), other=float("-inf")),
    )


@triton.jit(do_not_specialize=["T", "B", "K", "chunk", "stride_t", "stride_b"])
def _recursion_kernel(
    p_lp,  # (T, B, K), float32 or float64, with the strides given
    p_top,  # (T, B) in p_lp's dtype: a frame's largest emission
    p_first,  # (B, K) int64
    p_input_lengths,  # (B,) int64
    p_target_lengths,  # (B,) int64
    p_states,  # (2, B, T, 2, K), written if STORE
    p_nll,  # (B,) float64, written
    p_left,  # (programs, T) float64, read if CHUNKED and chunk > 0
    p_right,  # (programs, T) float64, written if CHUNKED
    T,
    B,
    K,
    chunk,
    stride_t,
    stride_b,
    stride_k,
    STORE: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One recursion of one utterance a program: grid (B,) forward alone, or (2 B,), the second half backward.

    States live in registers in p_lp's dtype: i = BLOCK_K chunk .. of either kind, and without CHUNKED that is all, so
    BLOCK_K >= K. Reads frames within the input length alone. p_states holds forward states after their frame emits,
    backward states before, blank[i] and label[i] at column i of their row; nothing past the lengths is written. They
    are relative to the frame's shift, or, with CHUNKED, absolute in float64. p_nll is written by the forward program
    that holds the last state, NaN where a length is out of range.

    Chunks are launched from left to right. Each leaves its last label's state after every frame in p_right (absolute,
    float64), which is p_left of the next. Within a program neighbours exchange states by tl.gather: nothing that one
    thread writes to global memory is read by another of the same launch.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_b = i_program % B
    reverse = i_program >= B
    frames = tl.load(p_input_lengths + i_b)
    labels = tl.load(p_target_lengths + i_b)
    valid = (frames >= 0) & (frames <= T) & (labels >= 0) & (labels < K)
    frames = tl.where(valid, frames, 0)
    labels = tl.where(valid, labels, 0)
    begin = tl.zeros((), tl.int64)
    if CHUNKED:
        begin += chunk * BLOCK_K
        frames = tl.where(begin <= labels, frames, 0)
    o_k = tl.arange(0, BLOCK_K)
    o_state = begin + o_k
    m_label = o_state < labels
    # This direction's states, counted from the target's start.
    o_label = tl.where(reverse, labels - 1 - o_state, o_state)
    o_blank = tl.where(reverse, labels - o_state, o_state)
    p_first += i_b * K
    o_column = o_label + 1
    own = tl.load(p_first + o_column, mask=m_label, other=0)
    last = tl.load(p_first + tl.where(reverse, o_column + 1, o_column - 1), mask=m_label & (o_state > 0), other=-1)
    skip = m_label & (own != last)
    left = tl.maximum(o_k - 1, 0)

    LOG: tl.constexpr = p_lp.dtype.element_ty
    blank = tl.full((BLOCK_K,), float("-inf"), LOG)
    label = tl.full((BLOCK_K,), float("-inf"), LOG)
    shift = tl.zeros((), tl.float64)
    # What enters the first state: without a chunk to the left, a state that is certain before the first frame alone.
    enter = tl.zeros((), LOG)
    if CHUNKED:
        p_left += i_program * T
        p_right += i_program * T
        fed = chunk > 0
        if fed:
            enter = tl.full((), float("-inf"), LOG)
            # Start from the shift of the first probability that will come in, lest its digits drown in its magnitude.
            t_first = frames
            t = tl.zeros((), tl.int64)
            while t < frames:
                o_t = t + o_k
                arrived = tl.load(p_left + o_t, mask=o_t < frames, other=float("-inf")) > float("-inf")
                t_first = tl.minimum(t_first, tl.min(tl.where(arrived, o_t, frames), 0))
                t += BLOCK_K
            shift = tl.load(p_left + t_first, mask=t_first < frames, other=0.0)
    step = tl.where(reverse, -stride_t, stride_t).to(tl.int64)
    step_top = tl.where(reverse, -B, B).to(tl.int64)
    p_frame = p_lp + i_b * stride_b + tl.where(reverse, frames - 1, 0) * stride_t
    p_top += i_b + tl.where(reverse, frames - 1, 0) * B
    p_states += i_program * T * 2 * K
    # Emissions are loaded four frames ahead: a trip to memory takes far longer than a frame's arithmetic.
    t0, b0, l0 = _frame(p_frame, p_top, o_column, stride_k, o_state, labels, 0 < frames)
    t1, b1, l1 = _frame(p_frame + step, p_top + step_top, o_column, stride_k, o_state, labels, 1 < frames)
    t2, b2, l2 = _frame(p_frame + step * 2, p_top + step_top * 2, o_column, stride_k, o_state, labels, 2 < frames)
    t3, b3, l3 = _frame(p_frame + step * 3, p_top + step_top * 3, o_column, stride_k, o_state, labels, 3 < frames)
    t = tl.zeros((), tl.int64)
    while t < frames:
        p_ahead = p_frame + step * (t + 4)
        p_ahead_top = p_top + step_top * (t + 4)
        at0, ab0, al0 = _frame(p_ahead, p_ahead_top, o_column, stride_k, o_state, labels, t + 4 < frames)
        at1, ab1, al1 = _frame(
            p_ahead + step, p_ahead_top + step_top, o_column, stride_k, o_state, labels, t + 5 < frames
        )
        at2, ab2, al2 = _frame(
            p_ahead + step * 2, p_ahead_top + step_top * 2, o_column, stride_k, o_state, labels, t + 6 < frames
        )
        at3, ab3, al3 = _frame(
            p_ahead + step * 3, p_ahead_top + step_top * 3, o_column, stride_k, o_state, labels, t + 7 < frames
        )
        for _ in tl.static_range(4):
            live = t < frames
            before = tl.where(o_k == 0, enter, tl.gather(label, left, 0))
            into_blank, into_label = _enter(blank, label, before, skip)
            top = tl.where(t0 == float("-inf"), 0.0, t0)
            blank = tl.where(live, into_blank + (b0 - top), blank)
            label = tl.where(live, into_label + (l0 - top), label)
            shift += top.to(tl.float64)
            enter = tl.full((), float("-inf"), LOG)
            if CHUNKED:
                tl.store(
                    p_right + t + o_k * 0, shift + label.to(tl.float64), mask=o_k == tl.where(live, BLOCK_K - 1, -1)
                )
                if fed:
                    # The frame before a dead one is the last: its state enters nothing but the loss.
                    enter = (tl.load(p_left + tl.minimum(t, frames - 1)) - shift).to(LOG)
            if STORE:
                p_row = p_states + tl.where(reverse, frames - 1 - t, t) * 2 * K
                out_blank = tl.where(reverse, into_blank, blank)
                out_label = tl.where(reverse, into_label, label)
                if CHUNKED:
                    out_blank = shift + out_blank.to(tl.float64)
                    out_label = shift + out_label.to(tl.float64)
                tl.store(p_row + o_blank, out_blank, mask=o_state <= tl.where(live, labels, -1))
                tl.store(p_row + K + o_label, out_label, mask=o_state < tl.where(live, labels, 0))
            t0, t1, t2 = t1, t2, t3
            b0, b1, b2 = b1, b2, b3
            l0, l1, l2 = l1, l2, l3
            t += 1
        t0, t1, t2, t3 = at0, at1, at2, at3
        b0, b1, b2, b3 = ab0, ab1, ab2, ab3
        l0, l1, l2, l3 = al0, al1, al2, al3
        if t % 16 == 0:
            top = tl.maximum(tl.max(tl.maximum(blank, label), 0), enter)
            top = tl.where(top == float("-inf"), 0.0, top)
            blank -= top
            label -= top
            enter -= top
            shift += top.to(tl.float64)
    if (i_program < B) & (begin <= labels) & (labels - begin < BLOCK_K):
        last_blank = tl.max(tl.where(o_state == labels, blank, float("-inf")), 0)
        last_label = tl.max(tl.where(o_state == labels - 1, label, float("-inf")), 0)
        last_label = tl.where(labels == begin, enter, last_label)
        nll = -(shift + _log_add(last_blank, last_label).to(tl.float64))
        nll = tl.where(frames == 0, tl.where(labels == 0, 0.0, float("inf")), nll)
        tl.store(p_nll + i_b, tl.where(valid, nll, float("nan")))


def alpha_beta(
    log_probs_TBK: Tensor,  # compact emissions, column 0 the blank, column s + 1 label s; any strides
    first_BK: Tensor,  # int64 compact column where the same class first occurs
    input_lengths_B: Tensor,  # int64, on the device of log_probs
    target_lengths_B: Tensor,  # int64, on the device of log_probs
    need_occupancy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood (B,) float64 and occupancy gamma (T, B, K), or None.

    Computed, and gamma returned, in float32, or float64 if log_probs is. gamma_t(k) is the posterior probability that
    frame t emits column k (Graves 2006, eq. 14); it is 0 in columns that repeat an earlier one, past the input length,
    and everywhere in an utterance whose loss is inf. Frames past an input length are never read. A length out of range
    gives that utterance a loss of NaN and a gamma of 0.
    """
    if log_probs_TBK.dtype != torch.float64:
        log_probs_TBK = log_probs_TBK.float()
    T, B, K = log_probs_TBK.shape
    nll_B = log_probs_TBK.new_empty(B, dtype=torch.float64)
    arguments = [x.contiguous() for x in (first_BK, input_lengths_B, target_lengths_B)]
    width = block(K, least=32, most=WIDEST // log_probs_TBK.itemsize)
    chunks = triton.cdiv(K, width)
    programs = 2 * B if need_occupancy else B
    dtype = log_probs_TBK.dtype if chunks == 1 else torch.float64
    states = log_probs_TBK.new_empty((2, B, T, 2, K) if need_occupancy else (0,), dtype=dtype)
    edges = states.new_empty((2, programs, T) if chunks > 1 else (2, 0), dtype=torch.float64)
    top_TB = log_probs_TBK.amax(2).contiguous()

    def start(chunk: int, num_warps: int) -> None:
        _recursion_kernel[(programs,)](
            log_probs_TBK,
            top_TB,
            *arguments,
            states,
            nll_B,
            edges[chunk % 2],
            edges[1 - chunk % 2],
            T,
            B,
            K,
            chunk,
            *log_probs_TBK.stride(),
            STORE=need_occupancy,
            CHUNKED=chunks > 1,
            BLOCK_K=width,
            num_warps=num_warps,
        )

    default = {"num_warps": min(max(width // 32, 1), 8)}
    key = f"bytes {log_probs_TBK.itemsize}, K {width}"
    for chunk in range(chunks if B else 0):
        tuning.launch("recursion", key, default, functools.partial(start, chunk))
    if not need_occupancy:
        return nll_B, None
    return nll_B, occupancy(states, nll_B, *arguments, log_probs_TBK.dtype)
