"""What launchers share: whether kernels are interpreted, and sizes of blocks."""

from __future__ import annotations

import os

import triton
from torch import Tensor

# tl.dot on bf16 is silently wrong in the interpreter (triton 3.7), so kernels take `UPCAST: tl.constexpr = INTERPRETED`
# and widen their operands there. On a GPU the flag costs nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def block(n: int, least: int = 16, most: int = 1 << 20) -> int:
    """The power of two a kernel pads n to: shapes inside one power of two share one compiled kernel."""
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


def row_sizes(D: int, tile: int, most_rows: int) -> dict[str, int]:
    """Usual sizes of a kernel that copies rows D wide: at most most_rows of them, `tile` elements at a time."""
    wide = block(D, most=1024)
    return {"BLOCK_N": min(tile // wide, most_rows), "BLOCK_D": wide, "num_warps": 4}


def row_key(rows: Tensor) -> str:
    """What the fastest sizes of such a kernel depend on, as a key of csrc_triton/tuned.json."""
    return f"bytes {rows.element_size()}, D {block(rows.shape[-1])}"


def chip() -> str:
    """What kernels are compiled for, "sm_90" or "gfx942"; "sm_90" under the interpreter, which has no chip.

    Asked of Triton's driver, not of torch, so that compiling ahead of time for another chip takes that chip's sizes.
    """
    if INTERPRETED:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
