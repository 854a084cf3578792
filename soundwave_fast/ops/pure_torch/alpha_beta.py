"""CTC's forward-backward over compact emissions in plain torch and numpy, in float64.

On few CPU cores both recursions run side by side over all utterances in probabilities rather than logarithms: four
small numpy calls a frame instead of an exp and a log per state, several times faster than the native op. Probabilities
can underflow; what that may have cost is bounded afterwards, and an utterance whose bound is not negligible goes to the
native op, as does everything on other devices and on many cores.

Shape legend: T frames, B utterances, S longest target, K = S + 1 compact columns, N = 2 K lattice states: 2 i is the
blank before label i, 2 i + 1 label i.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BLOCK_FRAMES = 16  # frames between two rescalings
GROUP_ELEMENTS = 4 << 20  # most elements of one array over time and states: 32 MiB
LATTICE_THREADS = 3  # the native op runs utterances in parallel, and wins when more threads than this can work
_LOG3 = math.log(3.0)  # most a frame multiplies a state by: it is entered from three, and emissions are at most 1
_LOG_GROWTH = BLOCK_FRAMES * _LOG3
_MARGIN = 30.0  # nats below the total probability: what underflow may cost stays in the 13th digit


def alpha_beta(
    log_probs_TBK: Tensor,  # compact emissions, column 0 the blank, column s + 1 label s; any strides
    first_BK: Tensor,  # int64 compact column where the same class first occurs
    input_lengths_B: Tensor,  # int64, on the device of log_probs
    target_lengths_B: Tensor,  # int64, on the device of log_probs
    need_occupancy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood (B,) float64 and occupancy gamma (T, B, K) float64, or None.

    gamma_t(k) is the posterior probability that frame t emits column k (Graves 2006, eq. 14); it is 0 in columns that
    repeat an earlier one, past the input length, and everywhere in an utterance whose loss is inf. Frames past an input
    length are never looked at. A length out of range gives that utterance a loss of NaN and a gamma of 0.
    """
    T, B, K = log_probs_TBK.shape
    bad_B = (input_lengths_B < 0) | (input_lengths_B > T) | (target_lengths_B < 0) | (target_lengths_B >= K)
    if bad_B.any():
        input_lengths_B = input_lengths_B.masked_fill(bad_B, 0)
        target_lengths_B = target_lengths_B.masked_fill(bad_B, 0)
    arguments = (first_BK, input_lengths_B, target_lengths_B, need_occupancy)
    if B == 0 or T == 0:
        nll_B = torch.where(target_lengths_B == 0, 0.0, torch.inf).double()
        gamma_TBK = log_probs_TBK.new_zeros(T, B, K, dtype=torch.float64) if need_occupancy else None
    elif log_probs_TBK.is_cpu and min(B, torch.get_num_threads()) <= LATTICE_THREADS:
        nll_B, gamma_TBK = _on_few_cores(log_probs_TBK, *arguments)
    else:
        nll_B, gamma_TBK = _native(log_probs_TBK, *arguments)
    return nll_B.masked_fill_(bad_B, torch.nan), gamma_TBK


def _native(lp_TBK: Tensor, first_BK: Tensor, input_lengths_B: Tensor, target_lengths_B: Tensor, need: bool):
    """The same by the native op, which returns exp(lp) - gamma as its gradient.

    Frames are first shifted to a maximum of 0, which gamma does not see, so that exp stays in [0, 1].
    """
    T, _, K = lp_TBK.shape
    dead_TB = torch.arange(T, device=lp_TBK.device)[:, None] >= input_lengths_B
    lp_TBK = lp_TBK.double().masked_fill(dead_TB[..., None], 0.0)
    top_TB = lp_TBK.amax(2)
    top_TB = torch.where(top_TB.isfinite(), top_TB, 0.0)
    lp_TBK = lp_TBK - top_TB[..., None]
    # The targets as compact columns; the native op rejects (B, 0) storage, so empty targets keep the blank's.
    arguments = (first_BK[:, 1:] if K > 1 else first_BK, input_lengths_B, target_lengths_B)
    nll_B, alpha = torch._ctc_loss(lp_TBK, *arguments, 0, False)
    gamma_TBK = None
    if need:
        grad_TBK = torch.ops.aten._ctc_loss_backward(torch.ones_like(nll_B), lp_TBK, *arguments, nll_B, alpha, 0, False)
        gamma_TBK = lp_TBK.exp().sub_(grad_TBK)
        never_TBK = dead_TB[..., None] | (nll_B == torch.inf)[:, None] | (lp_TBK == -torch.inf)
        gamma_TBK = gamma_TBK.masked_fill_(never_TBK, 0.0).clamp_(0.0, 1.0)
    return nll_B - top_TB.sum(0), gamma_TBK


def _on_few_cores(lp_TBK: Tensor, first_BK: Tensor, input_lengths_B: Tensor, target_lengths_B: Tensor, need: bool):
    """The lattice over groups of utterances, then the native op over those it is not sure of."""
    T, B, K = lp_TBK.shape
    t, k = max(1, int(input_lengths_B.max())), int(target_lengths_B.max()) + 1
    step = max(1, GROUP_ELEMENTS // (4 * t * k))
    parts = []
    for b in range(0, B, step):
        part = slice(b, b + step)
        lengths = (x[part].numpy() for x in (input_lengths_B, target_lengths_B))
        with np.errstate(all="ignore"):
            parts.append(_lattice(lp_TBK[:t, part, :k].detach(), first_BK[part, :k], *lengths, need))
    nll_B, gamma_TBK, sure_B = parts[0]
    if len(parts) > 1:
        nll_B, sure_B = (torch.cat([part[i] for part in parts]) for i in (0, 2))
        gamma_TBK = torch.cat([part[1] for part in parts], 1) if need else None
    if need and (t < T or k < K):
        gamma_TBK = torch.nn.functional.pad(gamma_TBK, (0, K - k, 0, 0, 0, T - t))
    if not sure_B.all():
        unsure = (~sure_B).nonzero().squeeze(1)
        rows = (x[unsure] for x in (first_BK, input_lengths_B, target_lengths_B))
        nll_B[unsure], gamma = _native(lp_TBK[:, unsure], *rows, need)
        if need:
            gamma_TBK[:, unsure] = gamma
    return nll_B, gamma_TBK


def _lattice(lp_TBK: Tensor, first_BK: Tensor, frames_B: np.ndarray, labels_B: np.ndarray, need: bool):
    """nll (B,), occupancy (T, B, K) or None, and whether each utterance's are right (B,).

    A row of a frame holds (state, utterance) of the forward recursion, two empty states, and the same of the backward
    recursion, which runs over the frames in reverse with the row reversed as well, so that one shift serves both. An
    utterance starts with probability 1 in a virtual state left of its first, which for the backward half is the one
    right of its last: there it waits through the frames past the input length.
    """
    T, B, K = lp_TBK.shape
    N, each_B = 2 * K, np.arange(B)
    dead_TB = np.arange(T)[:, None] >= frames_B
    ragged = frames_B.min() < T
    top_TB = lp_TBK.amax(2).double().numpy()
    top_TB[dead_TB | (top_TB == -np.inf)] = 0.0
    exp_TBK = lp_TBK.double().numpy() - top_TB[..., None]
    np.exp(exp_TBK, out=exp_TBK)
    if ragged:
        exp_TBK[dead_TB] = 0.0
    if labels_B.min() < K - 1:
        np.copyto(exp_TBK, 0.0, where=np.arange(K) > labels_B[:, None])

    column_N = np.zeros((K, 2), np.int64)
    column_N[:-1, 1] = np.arange(1, K)
    column_N = column_N.reshape(N)
    half, back = N * B, (N + 2) * B
    emit = np.empty((T, back + half))
    forward = exp_TBK.reshape(T, B * K).take((column_N[:, None] + each_B * K).reshape(-1), 1)
    forward[:, half - B :] = 0.0
    emit[:, :half], emit[:, half:back], emit[:, back:] = forward, 0.0, forward[::-1, ::-1]
    virtual_B = half - 1 - (2 * labels_B + 1) * B - each_B
    if ragged:
        emit[:, back + virtual_B] = dead_TB[::-1]

    skip = np.zeros(back + half)  # 1 where a state may be entered from two to its left: labels unlike the one before
    skip_NB = skip[:half].reshape(N, B)
    skip_NB[1] = 1.0
    labels = first_BK.numpy()
    skip_NB[3 : N - 1 : 2] = (labels[:, 2:] != labels[:, 1:-1]).T
    skip[back + 2 * B :] = skip[half - 1 : 2 * B - 1 : -1]
    skip[(back + 2 * B + virtual_B)[labels_B > 0]] = 1.0

    entered = np.empty_like(emit)  # probability of standing in a state before it emits
    state = np.zeros(2 * back)  # with two empty states on the left to shift in from
    start = state[B : 2 * B]
    start[:] = state[2 * B + back + virtual_B] = 1.0
    here, left, left2 = state[2 * B :], state[B:-B], state[: -2 * B]
    halves = state.reshape(2, N + 2, B)[:, 2:]
    skipped = np.empty_like(skip)
    scale = np.zeros((-(-T // BLOCK_FRAMES) + 1, 2, B))  # log of what each block's states are to be multiplied by
    add, multiply = np.add, np.multiply

    def advance(first: int, last: int) -> None:
        for into, probability in zip(entered[first:last], emit[first:last]):
            add(here, left, into)
            multiply(left2, skip, skipped)
            add(into, skipped, into)
            multiply(into, probability, here)

    advance(0, 1)
    start[:] = 0.0
    for block in range(len(scale) - 1):
        advance(max(block * BLOCK_FRAMES, 1), (block + 1) * BLOCK_FRAMES)
        top = np.maximum(halves.max(1), 1e-280)
        halves /= top[:, None]
        scale[block + 1] = scale[block] + np.log(top)

    scale[:, 1] = scale[:, 1, ::-1].copy()
    log_total_B = scale[-1, 1] + np.log(halves[1, -1] + halves[1, -2])[::-1]
    sure_B = _lost_at_most(scale, T, N) <= log_total_B
    if not sure_B.all():
        growth = _growth(emit[:, back:].reshape(T, N, B), skip[back:].reshape(N, B))[:, ::-1]
        sure_B = _lost(scale, growth, T, N) <= log_total_B
    nll_B = torch.from_numpy(-(log_total_B + top_TB.sum(0)))
    gamma_TBK = None
    if need:
        joint = entered[:, :half]
        joint *= emit[:, :half]
        joint *= entered[::-1, : back - 1 : -1]
        merged = torch.from_numpy(labels[:, column_N].T + each_B * K).reshape(-1)
        gamma_TBK = torch.zeros(T, B * K, dtype=torch.float64)
        gamma_TBK = gamma_TBK.scatter_add_(1, merged.expand(T, -1), torch.from_numpy(joint)).view(T, B, K)
        total_TB1 = gamma_TBK.sum(2, keepdim=True)
        gamma_TBK /= total_TB1.masked_fill_(total_TB1 == 0.0, 1.0)
    return nll_B, gamma_TBK, torch.from_numpy(sure_B)


def _growth(emit_TNB: np.ndarray, skip_NB: np.ndarray) -> np.ndarray:
    """(blocks, B): log of the most that a block's frames can multiply a state's probability by, over all its paths."""
    T, N, B = emit_TNB.shape
    full = T // BLOCK_FRAMES
    state = np.zeros((full, N + 2, B))
    here = state[:, 2:]
    here[:] = 1.0
    blocks = emit_TNB[: full * BLOCK_FRAMES].reshape(full, BLOCK_FRAMES, N, B)
    for frame in range(BLOCK_FRAMES):
        here[:] = (here + state[:, 1:-1] + state[:, :-2] * skip_NB) * blocks[:, frame]
    growth = np.full((-(-T // BLOCK_FRAMES), B), _LOG_GROWTH)
    growth[:full] = np.log(here.max(1))
    return growth


def _lost(scale: np.ndarray, growth: np.ndarray, T: int, N: int) -> np.ndarray:
    """(B,): log of a bound on the probability that underflow may have removed, plus a margin.

    A step in block i of the forward recursion loses at most tiny * e^a_i per state, a_i being the block's scale. What
    that would have become is at most the backward recursion's value there or, where that lost something too, in its
    block j (scale b_j), tiny * e^b_j times what the blocks in between multiply it by:

        lost <= sum_i tiny e^a_i (3^16 e^b_i + sum_j tiny e^b_j prod growth)        and the same from the other side
    """
    blocks = len(scale) - 1
    forward, backward = scale[:blocks, 0], scale[:blocks, 1]
    # Blocks count from the utterance's start in one recursion, from its end in the other, so one meets two others.
    start = np.arange(blocks) * BLOCK_FRAMES
    meets = np.stack([T - 1 - start, np.maximum(T - start - BLOCK_FRAMES, 0)]) // BLOCK_FRAMES
    once = (forward + backward[meets].max(0)).max(0) + _LOG_GROWTH
    total = np.concatenate([np.zeros((1, growth.shape[1])), growth.cumsum(0)])
    ends = (T - start) // BLOCK_FRAMES
    upto = np.maximum(total[ends], total[meets[1]])
    since = np.maximum(-total[:-1], -total[1:])
    twice = (forward + upto)[:, None] + backward + since + 2 * _LOG_GROWTH
    twice = np.where((ends[:, None] >= np.arange(blocks))[..., None], twice, -np.inf).max((0, 1))
    return np.maximum(once + _steps(T, N), twice + 2 * _steps(T, N)) + _MARGIN


def _lost_at_most(scale: np.ndarray, T: int, N: int) -> np.ndarray:
    """A bound on _lost that takes no second look at the emissions: every block grows threefold a frame."""
    scales = scale.max(0).sum(0) + _LOG_GROWTH
    return np.maximum(scales + _steps(T, N), scales + 2 * _steps(T, N) + (T + BLOCK_FRAMES) * _LOG3) + _MARGIN


def _steps(T: int, N: int) -> float:
    """Log of what all roundings of one recursion to the smallest number can lose, relative to the scale."""
    return math.log(5.0 * N * T) + math.log(np.finfo(np.float64).tiny)
