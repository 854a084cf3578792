"""Block sizes of the attention kernels, by kernel, chip, element size and head width.

Chosen by compiling ahead of time: the largest blocks that fit the shared memory and spill next to nothing. What was
measured to be faster on a chip stands in csrc_triton/tuned.json and goes first.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from csrc_triton import tuning
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


def launch(kernel: str, x: Tensor, queries: int, start: Callable[..., None]) -> None:
    """`start(**blocks)`, blocks, warps and stages as kernels take them for tensors like x (rows, heads, d).

    BLOCK_M is no larger than `queries`, the most queries to a key head, need.
    """
    d = x.shape[2]
    key = (x.element_size(), 64 if d <= 64 else 128)
    most, keys, warps, stages = _of_this_chip().get(kernel, {}).get(key) or _SIZES[kernel][key]
    default = {"BLOCK_M": most, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}

    def fitted(BLOCK_M: int, **others: int) -> None:
        start(BLOCK_M=block(queries, most=BLOCK_M), BLOCK_D=block(d), EVEN_D=d == block(d), **others)

    tuning.launch(f"attention {kernel}", f"bytes {key[0]}, d {key[1]}", default, fitted)


def _of_this_chip() -> dict[str, _Table]:
    name = chip()
    if name.startswith("gfx"):
        return _AMD
    return {} if 90 <= int(name.removeprefix("sm_")) < 120 else _OTHER_CUDA
