"""Triton kernels of varlen_cross_attention: online-softmax forward, query-stationary backward; no atomics.

Shape legend: Nq, Nk rows over the batch, B utterances, H query heads, G key heads, R = H / G, d head width. The R query
heads that share a key head are R times as many queries of it, so every kernel sees M = rows * R queries of one key
head, query m being row m // R, head g * R + m % R. Rows past the last offset count as utterance B, which has no keys.
"""

from csrc_triton.varlen_cross_attention.forward_kernel import forward
from csrc_triton.varlen_cross_attention.stationary_kernel import backward

__all__ = ["backward", "forward"]
