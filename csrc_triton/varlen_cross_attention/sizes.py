"""Block sizes of the attention kernels, by kernel, chip, element size and head width.

A fixed table: what autotuning picks may differ from run to run and from rank to rank, and the last bits with it.
Chosen by compiling ahead of time: the largest blocks that fit the shared memory and spill next to nothing.
"""

from __future__ import annotations

from torch import Tensor

from csrc_triton.launch import block, chip

# (bytes of an element, padded head width): most queries, keys, warps, stages
_Table = dict[tuple[int, int], tuple[int, int, int, int]]
_SIZES: dict[str, _Table] = {
    "forward": {(2, 64): (128, 64, 8, 2), (2, 128): (128, 64, 8, 2), (4, 64): (64, 32, 8, 1), (4, 128): (32, 32, 8, 1)},
    "stationary": {
        (2, 64): (128, 64, 8, 2),
        (2, 128): (128, 64, 8, 2),
        (4, 64): (32, 32, 8, 1),
        (4, 128): (16, 32, 8, 1),
    },
    "queries": {(2, 64): (64, 64, 8, 2), (2, 128): (64, 64, 8, 2), (4, 64): (32, 32, 8, 1), (4, 128): (16, 16, 8, 1)},
    "keys": {(2, 64): (64, 64, 8, 2), (2, 128): (64, 64, 8, 1), (4, 64): (32, 32, 8, 1), (4, 128): (16, 16, 8, 1)},
}
# Where a chip is no H100, B200 or the like: less shared memory, or operands that have to be held in registers.
_OTHER_CUDA: dict[str, _Table] = {
    "stationary": {(2, 64): (128, 32, 8, 2), (2, 128): (64, 64, 8, 2)},
    "keys": {(2, 128): (64, 64, 8, 2)},
}
_AMD: dict[str, _Table] = {
    "forward": {(2, 64): (128, 64, 8, 1), (2, 128): (128, 64, 8, 1)},
    **{name: {(2, 64): (64, 32, 8, 1), (2, 128): (64, 32, 8, 1)} for name in ("stationary", "queries", "keys")},
}


def sizes(kernel: str, x: Tensor, queries: int) -> dict[str, int]:
    """Blocks, warps and stages for tensors like x (rows, heads, d), at most `queries` queries to a key head."""
    d = x.shape[2]
    key = (x.element_size(), 64 if d <= 64 else 128)
    most, keys, warps, stages = _of_this_chip().get(kernel, {}).get(key) or _SIZES[kernel][key]
    return {
        "BLOCK_M": block(queries, most=most),
        "BLOCK_N": keys,
        "BLOCK_D": block(d),
        "EVEN_D": d == block(d),
        "num_warps": warps,
        "num_stages": stages,
    }


def _of_this_chip() -> dict[str, _Table]:
    name = chip()
    if name.startswith("gfx"):
        return _AMD
    return {} if 90 <= int(name.removeprefix("sm_")) < 120 else _OTHER_CUDA
