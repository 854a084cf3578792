"""Block sizes of the attention kernels, by chip, element size and head width.

A fixed table: what autotuning picks may differ from run to run and from rank to rank, and the last bits with it.
Chosen by compiling ahead of time: the largest blocks that fit the shared memory and spill few registers or none.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from csrc_triton.launch import block

# (bytes of an element, padded head width): most queries, keys, warps, stages
_FORWARD = {(2, 64): (128, 64, 8, 2), (2, 128): (128, 64, 8, 2), (4, 64): (64, 32, 8, 1), (4, 128): (32, 32, 8, 1)}
_STATIONARY = {(2, 64): (128, 64, 8, 2), (2, 128): (128, 64, 8, 2), (4, 64): (32, 32, 8, 1), (4, 128): (16, 32, 8, 1)}
_TILED = {**_STATIONARY, (2, 64): (64, 64, 8, 2), (2, 128): (64, 64, 8, 2)}
_SMALL = {(2, 128): (64, 64, 8, 2)}  # other chips than H100, B200 and their kin have less shared memory
_AMD = {(2, 64): (64, 32, 4, 1), (2, 128): (64, 32, 4, 1)}  # 64 KiB of shared memory


def forward_sizes(x: Tensor, queries: int) -> dict[str, int]:
    """Blocks, warps and stages for tensors like x (rows, heads, d), at most `queries` queries to a key head."""
    return _sizes(_FORWARD, x, queries)


def backward_sizes(x: Tensor, queries: int) -> tuple[bool, dict[str, int]]:
    """Whether one program can hold all queries of a key head, and the sizes to go with it."""
    chip = _chip(x.device.index) if x.is_cuda else {}
    sizes = _sizes({**_STATIONARY, **chip}, x, queries)
    if queries <= sizes["BLOCK_M"]:
        return True, sizes
    return False, _sizes({**_TILED, **chip}, x, queries)


@functools.cache
def _chip(device: int) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    if torch.version.hip:
        return _AMD
    return _SMALL if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 200_000 else {}


def _sizes(table: dict[tuple[int, int], tuple[int, int, int, int]], x: Tensor, queries: int) -> dict[str, int]:
    d, item = x.shape[2], x.element_size()
    most, keys, warps, stages = table[item, 64 if d <= 64 else 128]
    return {
        "BLOCK_M": block(queries, most=most),
        "BLOCK_N": keys,
        "BLOCK_D": block(d),
        "EVEN_D": d == block(d),
        "num_warps": warps,
        "num_stages": stages,
    }
