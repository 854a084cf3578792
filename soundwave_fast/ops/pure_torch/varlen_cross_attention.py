"""varlen_cross_attention in plain torch: one utterance after the other, each by whatever is fastest for it on a CPU.

In float32 and float64 that is torch's own fused attention (`fused_attention`), which keeps a log-sum-exp a row. In half
precision, with dropout or with shared key heads it is matrix products: weights of the first `KEPT` (query, key, head)
triples are kept for backward, the rest computed again. Matrix products also give the gradients of fused attention where
only some are asked for (it has all or none), or where the scores are too large for its log-sum-exp. Elsewhere the
lengths are not on the host: one block padded to the longest, nothing kept.

Shape legend: Nq, Nk rows over the batch, B utterances, H query heads, G key heads, R = H / G, d head width, M queries
and L keys of one key head in one utterance: the R heads that share a key head are simply more queries of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from soundwave_fast.ops.pure_torch import fused_attention
from soundwave_fast.ops.pure_torch.fused_attention import Utterance, utterances

KEPT = 1 << 26  # elements: 256 MiB in float32
_AT_ONCE = 1 << 22  # weights in the making: longer utterances are done some heads at a time


def forward(
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d)
    v: Tensor,  # (Nk, G, d)
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor,  # (B + 1,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # (1,) int64 on the CPU, with dropout
    keep: bool,  # whether backward will follow
) -> tuple[Tensor, Tensor]:
    """out (Nq, H, d), and what is kept for `backward` in one dimension: weights or log-sum-exp, block after block."""
    generator = _generator(q, seed)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if cu_seqlens_q.device.type != "cpu":
        blocks = _Padded(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        q, k, v = blocks.queries(q, k), blocks.keys(k), blocks.keys(v)
        weights = _dropped(blocks.weights(q, k, scale), dropout_p, generator)[0]
        return blocks.unpad_queries(torch.bmm(weights, v), out), q.new_empty(0)
    kept = q.new_empty(kept_elements(q, k, max_seqlen_k, dropout_p, keep))
    if fused_attention.serves(q, k, dropout_p):
        fused_attention.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, out, kept)
        _zero_the_rest(cu_seqlens_q, cu_seqlens_k, out)
        return out, kept
    used = 0
    for rows_q, rows_k, heads in _blocks(utterances(cu_seqlens_q, cu_seqlens_k), q, k):
        queries = _fold(q[rows_q], k, heads)
        keys, values = k[rows_k, heads].transpose(0, 1), v[rows_k, heads].transpose(0, 1)
        size = queries.shape[0] * queries.shape[1] * keys.shape[1]
        slot = kept[used : used + size]
        weights = _weights(queries, keys, scale, slot.view(*queries.shape[:2], -1) if slot.numel() == size else None)
        used += size if slot.numel() == size else 0
        _unfold(torch.bmm(_dropped(weights, dropout_p, generator)[0], values), out[rows_q], k, heads)
    _zero_the_rest(cu_seqlens_q, cu_seqlens_k, out)
    kept[used:].zero_()
    return out, kept


def kept_elements(q: Tensor, k: Tensor, max_seqlen_k: int, dropout_p: float, keep: bool) -> int:
    """How many elements forward has room for to keep, on a CPU; known from shapes alone."""
    if not keep or q.device.type != "cpu":
        return 0
    rows = q.shape[0] * q.shape[1]
    return rows if fused_attention.serves(q, k, dropout_p) else torch.sym_min(rows * max_seqlen_k, KEPT)


def backward(
    grad: Tensor,  # (Nq, H, d)
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d)
    v: Tensor,  # (Nk, G, d)
    out: Tensor,  # (Nq, H, d), forward's
    kept: Tensor,  # forward's
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor,  # (B + 1,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,  # forward's
    need_q: bool,
    need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; what is not needed comes back with no elements."""
    generator = _generator(q, seed)
    dq = q.new_empty(q.shape if need_q else 0)
    dk, dv = (k.new_empty(k.shape if need_kv else 0) for _ in range(2))
    if cu_seqlens_q.device.type != "cpu":
        blocks = _Padded(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        queries, grads = blocks.queries(q, k), blocks.queries(grad, k)
        keys, values = blocks.keys(k), blocks.keys(v)
        weights = blocks.weights(queries, keys, scale)
        grads = _gradients(grads, queries, keys, values, weights, scale, dropout_p, generator, need_q, need_kv)
        return tuple(
            x if g is None else unpad(g, x)
            for unpad, g, x in zip((blocks.unpad_queries, *[blocks.unpad_keys] * 2), grads, (dq, dk, dv))
        )
    todo = utterances(cu_seqlens_q, cu_seqlens_k)
    if fused_attention.serves(q, k, dropout_p):
        if need_q and need_kv:
            todo = fused_attention.backward(grad, q, k, v, out, kept, cu_seqlens_q, cu_seqlens_k, scale, dq, dk, dv)
        kept = kept[:0]  # no weights
    _products_backward(grad, q, k, v, kept, todo, scale, dropout_p, generator, dq, dk, dv)
    if need_q:
        _zero_the_rest(cu_seqlens_q, cu_seqlens_k, dq)
    if need_kv:
        _zero_the_rest(cu_seqlens_k, cu_seqlens_q, dk, dv)
    return dq, dk, dv


def _products_backward(grad, q, k, v, kept, todo: Iterable[Utterance], scale, dropout_p, generator, dq, dk, dv) -> None:
    """Fill dq, dk, dv where they have elements, from the weights that were kept and others made again."""
    used = 0
    for rows_q, rows_k, heads in _blocks(todo, q, k):
        queries, grads = _fold(q[rows_q], k, heads), _fold(grad[rows_q], k, heads)
        keys, values = k[rows_k, heads].transpose(0, 1), v[rows_k, heads].transpose(0, 1)
        size = queries.shape[0] * queries.shape[1] * keys.shape[1]
        if kept.numel() - used >= size:
            weights = kept[used : used + size].view(*queries.shape[:2], -1)
            used += size
        else:
            weights = _weights(queries, keys, scale)
        need = (dq.numel() > 0, dk.numel() > 0)
        dq_, dk_, dv_ = _gradients(grads, queries, keys, values, weights, scale, dropout_p, generator, *need)
        if dq_ is not None:
            _unfold(dq_, dq[rows_q], k, heads)
        if dk_ is not None:
            dk[rows_k, heads] = dk_.transpose(0, 1)
            dv[rows_k, heads] = dv_.transpose(0, 1)


def _weights(queries_GMd: Tensor, keys_GLd: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    return torch.softmax(_product(queries_GMd, keys_GLd, scale), -1, out=out)


def _product(a_GMd: Tensor, b_GLd: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a b^T. In half precision only a contiguous operand gets the fast kernel when it is transposed."""
    if b_GLd.dtype in (torch.bfloat16, torch.float16):
        b_GLd = b_GLd.contiguous()
    return torch.baddbmm(a_GMd.new_zeros(()), a_GMd, b_GLd.mT, beta=0, alpha=scale)


def _gradients(
    grads: Tensor,  # (G, M, d) of the output
    queries: Tensor,  # (G, M, d)
    keys: Tensor,  # (G, L, d)
    values: Tensor,  # (G, L, d)
    weights: Tensor,  # (G, M, L), before dropout
    scale: float,
    dropout_p: float,
    generator: torch.Generator | None,
    need_q: bool,
    need_kv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of queries (G, M, d), keys and values (G, L, d); None where not needed."""
    dropped, factor = _dropped(weights, dropout_p, generator)
    dweights = _product(grads, values)
    if factor is not None:
        dweights *= factor
    dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
    zero = weights.new_zeros(())
    dq = torch.baddbmm(zero, dscores, keys, beta=0, alpha=scale) if need_q else None
    if not need_kv:
        return dq, None, None
    return dq, torch.baddbmm(zero, dscores.mT, queries, beta=0, alpha=scale), torch.bmm(dropped.mT, grads)


def _dropped(weights: Tensor, p: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    """weights after dropout, and the factors, which the generator gives again when it starts from the same seed."""
    if generator is None:
        return weights, None
    factor = torch.empty_like(weights).bernoulli_(1 - p, generator=generator).div_(1 - p)
    return weights * factor, factor


def _generator(x: Tensor, seed: Tensor | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator(x.device).manual_seed(int(seed))


def _blocks(todo: Iterable[Utterance], q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of q, rows of k and key heads of each piece of work."""
    G, R = k.shape[1], q.shape[1] // k.shape[1]
    for rows_q, rows_k in todo:
        pairs = (rows_q.stop - rows_q.start) * (rows_k.stop - rows_k.start)
        step = max(_AT_ONCE // (pairs * R), 1)
        for g in range(0, G, step):
            yield rows_q, rows_k, slice(g, min(g + step, G))


def _fold(x_NHd: Tensor, k: Tensor, heads: slice) -> Tensor:
    """(n, H, d) -> (G, n * R, d), of some key heads; a view where R or the number of heads is 1."""
    x = x_NHd.unflatten(1, (k.shape[1], -1))[:, heads]
    return x.transpose(0, 1).flatten(1, 2)


def _unfold(x_GMd: Tensor, out_NHd: Tensor, k: Tensor, heads: slice) -> None:
    """The inverse of _fold, into some heads of out."""
    target = out_NHd.unflatten(1, (k.shape[1], -1))[:, heads]
    target.copy_(x_GMd.unflatten(1, (target.shape[0], -1)).transpose(0, 1))


def _zero_the_rest(cu_seqlens: Tensor, other: Tensor, *tensors: Tensor) -> None:
    """Zero the rows of utterances that have no row on the other side, and those of no utterance."""
    offsets = cu_seqlens.tolist()
    idle = [rows for rows, (a, b) in zip(pairwise(offsets), pairwise(other.tolist())) if a == b]
    for start, end in (*idle, (offsets[-1], tensors[0].shape[0])):
        for x in tensors:
            x[start:end].zero_()


class _Padded:
    """A packed batch as one block of equally long utterances, without a look at the lengths from the host.

    Padding is 0. An utterance without keys sees one padding key, so that it gets 0 and not NaN.
    """

    def __init__(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, width_q: int, width_k: int) -> None:
        self.cu_q, self.cu_k, self.width_q, self.width_k = cu_seqlens_q, cu_seqlens_k, width_q, max(width_k, 1)

    def queries(self, q: Tensor, k: Tensor) -> Tensor:
        """(Nq, H, d) -> (B * G, width * R, d)."""
        self.G = k.shape[1]
        x = self._pad(q, self.cu_q, self.width_q).unflatten(2, (self.G, -1))
        return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def keys(self, k: Tensor) -> Tensor:
        """(Nk, G, d) -> (B * G, width, d)."""
        return self._pad(k, self.cu_k, self.width_k).transpose(1, 2).flatten(0, 1)

    def weights(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        scores = _product(queries, keys, scale)
        seen = torch.arange(self.width_k, device=scores.device) < self.cu_k.diff().clamp(min=1)[:, None]
        hidden = ~seen.repeat_interleave(self.G, 0, output_size=seen.shape[0] * self.G)
        return scores.masked_fill_(hidden[:, None], -torch.inf).softmax(-1)

    def unpad_queries(self, x: Tensor, out: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.G)).unflatten(2, (self.width_q, -1)).transpose(1, 2).flatten(2, 3)
        return self._unpad(x, self.cu_q, out)

    def unpad_keys(self, x: Tensor, out: Tensor) -> Tensor:
        return self._unpad(x.unflatten(0, (-1, self.G)).transpose(1, 2), self.cu_k, out)

    @staticmethod
    def _pad(x: Tensor, cu_seqlens: Tensor, width: int) -> Tensor:
        """(N, heads, d) -> (B, width, heads, d)."""
        place = torch.arange(width, device=x.device)
        real = place < cu_seqlens.diff()[:, None]
        if not x.shape[0]:
            return x.new_zeros(*real.shape, *x.shape[1:])
        index = torch.where(real, cu_seqlens[:-1, None] + place, 0).clamp(0, x.shape[0] - 1)
        return x.index_select(0, index.flatten()).unflatten(0, real.shape).masked_fill_(~real[..., None, None], 0)

    @staticmethod
    def _unpad(x: Tensor, cu_seqlens: Tensor, out: Tensor) -> Tensor:
        """(B, width, heads, d) -> (N, heads, d) into out; rows of no utterance 0."""
        if not x.numel():
            return out.zero_()
        row = torch.arange(out.shape[0], device=x.device, dtype=cu_seqlens.dtype)
        b = torch.searchsorted(cu_seqlens[1:], row, right=True)
        nobody = b == x.shape[0]
        b = b.clamp(max=x.shape[0] - 1)
        index = b * x.shape[1] + (row - cu_seqlens[b]).clamp(0, x.shape[1] - 1)
        return torch.index_select(x.flatten(0, 1), 0, index, out=out).masked_fill_(nobody[:, None, None], 0)
