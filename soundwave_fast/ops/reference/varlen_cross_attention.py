"""Truth of varlen_cross_attention: softmax attention, one utterance and one head at a time."""

import torch
from torch import Tensor


def varlen_cross_attention(
    q: Tensor,  # (Nq, H, d)
    k: Tensor,  # (Nk, G, d)
    v: Tensor,  # (Nk, G, d)
    cu_seqlens_q: list[int],
    cu_seqlens_k: list[int],
    softmax_scale: float | None = None,
) -> Tensor:
    """(Nq, H, d); 0 for queries without keys and rows beyond cu_seqlens_q[-1]."""
    H, share = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    heads = []
    for h in range(H):
        blocks = []
        for b in range(len(cu_seqlens_q) - 1):
            queries = q[cu_seqlens_q[b] : cu_seqlens_q[b + 1], h]
            keys = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
            if keys.start == keys.stop:
                blocks.append(torch.zeros_like(queries))
            else:
                weights = (queries @ k[keys, h // share].t() * scale).softmax(-1)
                blocks.append(weights @ v[keys, h // share])
        blocks.append(q.new_zeros(q.shape[0] - cu_seqlens_q[-1], q.shape[2]))
        heads.append(torch.cat(blocks))
    return torch.stack(heads, 1)
