"""Rows of a matrix to other places, as a CPU does it fast.

Shape legend: N rows, M rows of the output, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDEST = torch.complex128


def copy_rows(out_MD: Tensor, index_N: Tensor, rows_ND: Tensor) -> Tensor:
    """out[index[i]] = rows[i] in place, in out's dtype; out. Which of the rows with an equal index stays is open.

    index_copy_ moves a row element by element, so rows are handed over as elements of 16 bytes where they can be: two
    to three times as fast for float32 (bench/LOG.md).
    """
    if not index_N.numel():
        return out_MD  # index_copy_ wants an index even when the rows have no elements
    ratio = _WIDEST.itemsize // out_MD.element_size()
    wide = (
        out_MD.dtype == rows_ND.dtype
        and out_MD.is_contiguous() and rows_ND.is_contiguous()
        and rows_ND.shape[1] > 0
        # stride too: contiguous or not, a single row may have any
        and not any(x.shape[1] % ratio or x.stride(0) % ratio or x.storage_offset() % ratio for x in (out_MD, rows_ND))
    )  # fmt: skip
    if wide:
        out_MD.view(_WIDEST).index_copy_(0, index_N, rows_ND.view(_WIDEST))
        return out_MD
    return out_MD.index_copy_(0, index_N, rows_ND.to(out_MD.dtype))
