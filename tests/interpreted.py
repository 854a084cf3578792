"""What interpreted tests run on: matrix products that are alike on every CPU and, if asked for, tuned sizes."""

from __future__ import annotations

import numpy as np


def round_products_once() -> None:
    """Let interpreted `tl.dot` sum in float64 and round once.

    The interpreter leaves it to NumPy's BLAS in float32, whose order of summation, and so the last bits, depend on the
    CPU and on the tile's shape. No GPU's matrix unit is like that, and kernels promise the same bits for an utterance
    in any batch. What a GPU's own float32 sums cost is measured on a GPU (tests/gpu, and tests/ops run there).
    """
    try:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:  # no Triton on this platform
        return

    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *more):
        if not all(x.data.dtype in (np.float32, np.float16) for x in (a, b, d)):
            return plain(self, a, b, d, *more)
        out = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return TensorHandle(out.astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


class _AnyKey(dict):
    """Sizes for whatever key a launcher asks for."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        self.own = sizes

    def get(self, key, default=None):
        return self.own


def use_other_sizes() -> None:
    """As after a tuning that found another candidate than the default the fastest, for every kernel and key."""
    from bench.suite_tunables import TUNABLES
    from csrc_triton import tuning

    table = {tunable.kernel: _AnyKey(tunable.candidates[-1]) for tunable in TUNABLES if tunable.compiles}

    def tables() -> dict:
        return {tuning._chip(): table}

    tables.__wrapped__ = tuning._tables.__wrapped__  # tests of the file itself read it all the same
    tuning._tables = tables
